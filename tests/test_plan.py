"""Plans: what is crossed with what, what is taken out, and what a wrong key gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchsuite.errors import UsageError
from benchsuite.plan import plan as plans
from benchsuite.plan.cell import Cell, resolve
from benchsuite.plan.plan import Plan
from benchsuite.plan.selection import Selection
from benchsuite.results.store import Store
from benchsuite.rules import Machine
from benchsuite.rules import plans as judged
from benchsuite.running import forecast

QUICK = """
question = "Which synchronisation, at what cost?"
seeds = [0, 1, 2]
[cells]
workload = ["cnn"]
preset = ["digits"]
replicas = [1, 2, 4]
sync = ["synchronous", "asynchronous"]
topology = ["parameter_server", "ring", "native"]
[[cells.also]]
sync = ["ddp"]
topology = ["native"]
replicas = [1, 2, 4]
[cells.options.asynchronous]
lock = ["exclusive"]
[[exclude]]
sync = "asynchronous"
topology = ["ring", "native"]
[budget]
samples = 15360
timeout_s = 60
[[figures]]
kind = "metric_against"
x = ["samples", "seconds", "bytes"]
"""


@pytest.fixture
def make(tmp_path):
    def load(text: str, **how) -> Plan:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return judged.load(path, **how)

    return load


def refusal(make, text: str, **how) -> str:
    with pytest.raises(UsageError) as caught:
        make(text, **how)
    return str(caught.value)


def test_the_plan_of_the_design_gives_its_cells(make):
    plan = make(QUICK)
    assert (plan.name, plan.seeds, plan.num_excluded, plan.refused) == ("mine", (0, 1, 2), 6, ())
    assert plan.question == "Which synchronisation, at what cost?" and plan.text == QUICK
    assert plan.figures == ({"kind": "metric_against", "x": ["samples", "seconds", "bytes"]},)
    combinations = {(c.sync, c.topology, c.replicas) for c in plan.cells}
    expected = {
        ("synchronous", t, n) for t in ("parameter_server", "ring", "native") for n in (1, 2, 4)
    }
    expected |= {("asynchronous", "parameter_server", n) for n in (1, 2, 4)} | {
        ("ddp", "native", n) for n in (1, 2, 4)
    }
    assert combinations == expected and len(plan.cells) == 15
    assert all(c.budget.samples == 15360 and c.budget.timeout_s == 60 for c in plan.cells)
    assert all(c == resolve(c) for c in plan.cells)
    assert len(plan.runs()) == 45 and {c.seed for c in plan.runs()[:15]} == {0}


def test_refused_cells_are_kept_with_reason_and_remedy(make):
    plan = make(
        '[cells]\nsync = ["asynchronous"]\ntopology = ["ring", "parameter_server"]\nreplicas = 2\n'
    )
    assert len(plan.cells) == 1
    (refused,) = plan.refused
    assert (
        refused.cell.topology == "ring" and "every rank must enter the same step" in refused.reason
    )
    assert "set topology to parameter_server" in refused.reason


def test_option_lists_are_crossed_only_for_cells_that_use_the_member(make):
    plan = make(
        '[cells]\nsync = ["synchronous", "asynchronous"]\ntopology = "parameter_server"\nreplicas = 2\n'
        '[cells.options.asynchronous]\nlock = ["exclusive", "none"]\nserver_threads = [2, 3]\n'
    )
    asynchronous = [c.options["asynchronous"] for c in plan.cells if c.sync == "asynchronous"]
    assert len(plan.cells) == 1 + 4
    assert {(o["lock"], o["server_threads"]) for o in asynchronous} == {
        ("exclusive", 2),
        ("exclusive", 3),
        ("none", 2),
        ("none", 3),
    }
    assert all("asynchronous" not in c.options for c in plan.cells if c.sync == "synchronous")


def test_also_inherits_what_it_does_not_say_and_is_not_crossed_with_the_first(make):
    plan = make(
        '[cells]\npreset = "smoke"\nreplicas = [1, 2]\n[[cells.also]]\nreplicas = 4\nthreads = [1, 2]\n'
    )
    assert [(c.preset, c.replicas, c.threads) for c in plan.cells] == [
        ("smoke", 1, 1),
        ("smoke", 2, 1),
        ("smoke", 4, 1),
        ("smoke", 4, 2),
    ]


def test_a_block_may_have_its_own_budget(make):
    plan = make(
        '[cells]\n[[cells.also]]\npreset = "comm"\nbudget = { steps = 3 }\n[budget]\nsamples = 640\ntimeout_s = 9\n'
    )
    assert [(c.preset, c.budget.samples, c.budget.timeout_s) for c in plan.cells] == [
        ("digits", 640, 9),
        ("comm", 24, 9),
    ]


def test_a_table_is_one_value_and_a_list_of_tables_several(make):
    plan = make("[cells]\nreplicas = 2\nstraggler = [{}, { 0 = 4.0 }, { 0 = 2, 1 = 2 }]\n")
    assert [dict(c.straggler) for c in plan.cells] == [{}, {"0": 4.0}, {"0": 2.0, "1": 2.0}]
    assert dict(make("[cells]\nstraggler = { 0 = 4.0 }\n").cells[0].straggler) == {"0": 4.0}


def test_the_same_cell_twice_is_one_cell(make):
    plan = make('[cells]\nreplicas = [1, 1]\n[[cells.also]]\nworkload = "cnn"\n')
    assert len(plan.cells) == 1


def test_excludes_may_name_options_tables_and_lists(make):
    base = (
        '[cells]\nsync = "asynchronous"\ntopology = "parameter_server"\nreplicas = [1, 2, 4]\n'
        '[cells.options.asynchronous]\nlock = ["exclusive", "none"]\n[[exclude]]\n'
    )
    assert make(base + "replicas = [1, 4]\n").num_excluded == 4
    by_option = make(base + 'replicas = 1\noptions = { asynchronous = { lock = "none" } }\n')
    assert by_option.num_excluded == 1 and len(by_option.cells) == 5
    assert make(base + "straggler = {}\n").num_excluded == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed = [1]\n", "unknown key 'sed' of a plan; did you mean 'seeds'?"),
        ("[cells]\nreplica = 2\n", "unknown key 'replica' of [cells]; did you mean 'replicas'?"),
        ("[[cells.also]]\nsnyc = 'ddp'\n", "unknown key 'snyc' of [cells]; did you mean 'sync'?"),
        (
            "[[exclude]]\ntopologi = 'ring'\n",
            "unknown key 'topologi' of [[exclude]]; did you mean 'topology'?",
        ),
        ("[[exclude]]\ntopology = 'rng'\n", "unknown topology 'rng'; did you mean 'ring'?"),
        ("[budget]\nsample = 1\n", "unknown key 'sample' of budget; did you mean 'samples'?"),
        ("[cells.options.asynchronus]\nlock = 'none'\n", "did you mean 'asynchronous'?"),
        ("[cells]\nworkload = 'cmn'\n", "unknown workload 'cmn'; did you mean 'cnn'?"),
        ("[cells]\nreplicas = 'two'\n", "replicas takes an integer, not 'two'"),
        ("[cells]\nreplicas = 1.5\n", "replicas takes an integer, not 1.5"),
        ("[cells]\nreplicas = true\n", "replicas takes an integer, not True"),
        ("[cells]\nreplicas = []\n", "replicas = []: an empty list crosses to no cell"),
        (
            "[cells]\nstraggler = 4\n",
            "straggler takes a table, not 4: write straggler = { 0 = 4.0 }",
        ),
        ("[cells]\nstraggler = { first = 4 }\n", "straggler.first: the key is a worker's number"),
        ("[cells]\nlink_mbit = nan\n", "link_mbit takes a number or none, not nan"),
        ("[cells]\nseed = 1\n", "unknown key 'seed' of [cells]"),
        ("cells = 3\n", "cells takes a table, not 3: write [cells]"),
        ("[[cells]]\nreplicas = 1\n", "cells takes a table, not [{'replicas': 1}]"),
        ("[cells]\nalso = 5\n", "cells.also takes a list of tables, not 5: write [[cells.also]]"),
        ("[cells]\nalso = [5]\n", "cells.also takes a list of tables, not [5]"),
        ("[cells]\noptions = 5\n", "cells.options takes a table, not 5"),
        ("[cells]\nbudget = 5\n", "cells.budget takes a table, not 5"),
        ("[[cells.also]]\noptions = { cnn = 5 }\n", "cells.also.options.cnn takes a table, not 5"),
        ("exclude = 5\n", "exclude takes a list of tables, not 5: write [[exclude]]"),
        ("[exclude]\nsync = 'ddp'\n", "exclude takes a list of tables"),
        ("[[exclude]]\noptions = 5\n", "exclude.options takes a table, not 5"),
        ("[[exclude]]\nbudget = 5\n", "exclude.budget takes a table, not 5"),
        ("figures = 5\n", "figures takes a list of tables, not 5: write [[figures]]"),
        ("budget = 5\n", "budget takes a table, not 5: write [budget]"),
        (
            "[cells.options.cnn]\nlr = nan\n",
            "lr takes a finite number, a word, true or false, not nan",
        ),
        (
            "[cells.options.cnn]\nlr = 2026-11-23\n",
            "lr takes a finite number, a word, true or false, not datetime",
        ),
        (
            "[cells]\nfaults = { rank = nan }\n",
            "faults.rank takes a finite number or a word, not nan",
        ),
        ("[cells]\nsync = 5\n", "sync takes a name, not 5"),
        ("seeds = -1\n", "seeds = [-1]: give at least one integer"),
        ("seeds = []\n", "seeds = []: give at least one integer"),
        ("seeds = [-1]\n", "give at least one integer from 0 to 2**63 - 1"),
        ("[cells\n", "mine.toml"),
    ],
)
def test_wrong_plans_name_the_file_the_key_and_the_nearest_known_one(make, text, message):
    said = refusal(make, text)
    assert message in said and "mine.toml" in said


def test_a_global_batch_of_nothing_is_refused_by_the_rules(make):
    made = make("[cells]\noptions = { cnn = { global_batch = 0 } }\n[budget]\nsteps = 2\n")
    assert (
        made.cells == ()
        and "global_batch = 0: a step has 1 sample or more" in made.refused[0].reason
    )
    assert forecast.forecast(made, Store("nowhere"), code_id="")["cells"] == []


def test_an_option_that_is_no_finite_number_is_refused_in_python_too():
    with pytest.raises(UsageError, match="option 'lr' of cnn takes a finite number, not inf"):
        resolve(Cell(options={"cnn": {"lr": float("inf")}}))


# --set


def test_set_holds_for_every_block(make):
    plan = make(QUICK, settings=["replicas=2", "precision=fp64", "budget.steps=10"])
    assert {(c.replicas, c.precision, c.budget.samples) for c in plan.cells} == {(2, "fp64", 640)}
    assert len(plan.cells) == 5 and plan.num_excluded == 2


def test_set_reads_lists_dotted_keys_and_bare_words(make):
    settings = [
        "replicas=1,2",
        'sync=["asynchronous"]',
        "options.asynchronous.lock=none",
        "straggler.0=4",
        "seeds=7",
    ]
    plan = make(QUICK, settings=settings, only="sync == asynchronous")
    assert plan.seeds == (7,)
    assert {
        (c.replicas, c.options["asynchronous"]["lock"], dict(c.straggler)["0"]) for c in plan.cells
    } == {(1, "none", 4.0), (2, "none", 4.0)}
    assert make(QUICK, settings=["straggler.0=4", "straggler=none"]).cells[0].straggler == {}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("replicas", "--set 'replicas' is not KEY=VALUE"),
        ("replica=2", "unknown key 'replica' of a cell; did you mean 'replicas'?"),
        (
            "options.ring.segment_kb=1",
            "unknown option 'segment_kb' of ring; did you mean 'segment_kib'?",
        ),
        ("options.k_sync.backup_workers=1", "unknown member 'k_sync' of this plan's cells"),
        ("budget.sample=1", "unknown key 'sample' of budget; did you mean 'samples'?"),
        ("precision=fp23", "unknown precision 'fp23'; did you mean 'fp32'?"),
        ("replicas.x=1", "replicas.x: replicas is 1, not a table"),
    ],
)
def test_wrong_settings_are_refused(make, setting, message):
    assert message in refusal(make, QUICK, settings=[setting])


# --only


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("sync == 'ddp'", 3),
        ("sync == ddp and replicas > 1", 2),
        ("topology in (ring, native) and not sync == ddp", 6),
        ("1 < replicas <= 4 or topology == ring", 11),
        ("options.asynchronous.lock == exclusive", 3),
        ("options['asynchronous']['lock'] != None", 3),
        ("world_size == 3", 2),
        ("not straggler and budget.samples == 15360", 15),
        ("link_mbit > 1 or replicas == 4", 5),
    ],
)
def test_only_keeps_what_the_expression_says(make, expression, kept):
    assert len(make(QUICK, only=expression).cells) == kept


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("snc == ddp", "unknown field 'snc'; did you mean 'sync'?"),
        ("replica > 1 and sync == ddp", "unknown field 'replica'; did you mean 'replicas'?"),
        ("not stragler", "unknown field 'stragler'; did you mean 'straggler'?"),
        ("sync > 1", "'synchronous' and 1 do not compare"),
        ("sync ==", "invalid syntax"),
        ("replicas == 64", "keeps none of 15 cells"),
        ("__import__('os').system('true') == sync", "is not allowed"),
        ("sync == (lambda: 1)()", "is not allowed"),
        ("sync is ddp", "use == and !="),
    ],
)
def test_wrong_expressions_are_refused_and_nothing_is_called(make, expression, message):
    assert message in refusal(make, QUICK, only=expression)


def test_only_compares_path_plugins_by_their_name(tmp_path):
    path = tmp_path / "my_net.py"
    path.write_text(
        "presets = {'default': {'global_batch': 8, 'budget_samples': 80}}\nclass Workload:\n    pass\n"
    )
    assert Selection("workload == my_net").keeps(resolve(Cell(workload=str(path))))


# seeds, names, flags, machine


def test_seeds_of_the_command_replace_those_of_the_plan(make):
    assert make(QUICK, seeds=[5, 5, 6]).seeds == (5, 6)


def test_a_plan_is_found_here_first_then_where_it_is_shipped(tmp_path, monkeypatch):
    shipped = tmp_path / "package" / "plans"
    for folder, question in ((tmp_path / "reports", "here"), (shipped, "shipped")):
        folder.mkdir(parents=True)
        (folder / "quick.toml").write_text(f'question = "{question}"\n')
    (shipped / "other.toml").write_text('question = "other"\n')
    monkeypatch.setattr(plans.plugins, "PACKAGE", tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    assert plans.locate("quick").read_text() == 'question = "here"\n'
    assert sorted(plans.available()) == ["other", "quick"]
    monkeypatch.chdir(shipped.parent)
    assert plans.locate("quick").read_text() == 'question = "shipped"\n'
    with pytest.raises(UsageError, match="unknown plan 'quik'; did you mean 'quick'"):
        plans.locate("quik")
    with pytest.raises(UsageError, match="no such file; known by name: other, quick"):
        plans.locate("nowhere/quick.toml")


def test_a_path_plugin_may_lie_beside_the_plan(make, tmp_path, monkeypatch):
    (tmp_path / "my_net.py").write_text(
        "presets = {'default': {'global_batch': 8, 'budget_samples': 80}}\nclass Workload:\n    lr: float = 0.1\n"
    )
    monkeypatch.chdir(Path("/"))
    plan = make('[cells]\nworkload = "my_net.py"\n[cells.options.my_net]\nlr = [0.1, 0.2]\n')
    assert [c.options["my_net"]["lr"] for c in plan.cells] == [0.1, 0.2]
    assert plan.cells[0].workload == str(tmp_path / "my_net.py")


def test_flags_describe_a_cell_and_its_id_is_that_of_the_plan(make):
    flags = {
        "workload": "cnn",
        "sync": "asynchronous",
        "topology": "parameter_server",
        "replicas": "2",
        "servers": None,
    }
    settings = ["budget.samples=15360", "budget.timeout_s=60"]
    (cell,) = judged.from_flags(flags, settings=settings).cells
    assert cell.id in {c.id for c in make(QUICK).cells}
    assert len(plans.from_flags({**flags, "replicas": "1,2,4"}).cells) == 3
    assert plans.from_flags(flags, seeds=[3]).runs()[0].seed == 3
    (refused,) = judged.from_flags({"replicas": 3}).refused
    assert "64 % 3 = 1" in refused.reason
    assert plans.from_flags({"replicas": 3}).refused == (), "not judged"


def test_the_machine_is_only_looked_at_where_it_matters(make):
    def never() -> Machine:
        raise AssertionError("nobody needs to look")

    plan = make("[cells]\nreplicas = [1, 2]\n")
    assert judged.on_this_machine(plan, never) is plan
    backends = judged.on_this_machine(
        make('[cells]\nbackend = ["gloo", "mpi"]\n'),
        lambda: Machine(torch="2.13.0", gloo=True, mpi=False),
    )
    assert [c.backend for c in backends.cells] == ["gloo"]
    assert [r.cell.backend for r in backends.refused] == [
        "mpi"
    ] and "without MPI" in backends.refused[0].reason
