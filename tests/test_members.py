"""A member is one file: what it declares is read, checked, obeyed and drawn, given by path too.

Each test writes a strategy, a topology, a compression or a rule into a temporary folder; nothing of
the package is touched.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from benchsuite import rules
from benchsuite.analysis import cells as naming
from benchsuite.cli import main
from benchsuite.compression import fp16
from benchsuite.errors import UsageError
from benchsuite.laws.harness.cases import tiny
from benchsuite.plan import conditions, declared, plugins
from benchsuite.plan.cell import AXES, Budget, Cell, resolve
from benchsuite.plan.plugins import PluginError
from benchsuite.report.drawing import style
from benchsuite.report.words import labels
from benchsuite.rules import plans
from benchsuite.sync import synchronous
from benchsuite.topology import ring
from benchsuite.virtual.world import simulate
from tests.bench import ROOT
from tests.user_files import user_file

DECLARES = """
    label = "Polite mean"
    short_label = "polite"
    colour = "#123456"
    looks = {}
    smallest_replicas = 2
    refuses = (
        {
            "rule": "politeness",
            "when": "bucket_mib > 0 and cell.replicas * 2 >= 8",
            "reason": "bucket_mib = {bucket_mib:g} of {name}: {cell.replicas * 2} is a crowd",
            "remedy": "set bucket_mib = 0, as {default.sync} has it",
        },
    )
"""


def own(folder: Path, module: object, name: str, declares: str, *without: str) -> str:
    """A copy of a member that ships with the suite, under another name, with other declarations."""
    text = Path(str(module.__file__)).read_text()  # type: ignore[attr-defined]
    dropped = ("label", "short_label", "order", "colour", "compressed_colour", *without)
    lines = [
        line
        for line in text.splitlines()
        if not any(line.startswith(f"    {each} = ") for each in dropped)
    ]
    kind = next(each for _, _, each in plugins.KINDS.values() if f"\nclass {each}" in text)
    head = next(at for at, line in enumerate(lines) if line.startswith(f"class {kind}"))
    end = next(at for at in range(head, len(lines)) if lines[at].startswith("    def "))
    lines[end:end] = declares.splitlines()
    path = folder / f"{name}.py"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def polite(folder: Path) -> str:
    return own(folder, synchronous, "polite", DECLARES, "looks")


def reasons(**fields: object) -> list[str]:
    return [problem.reason for problem in rules.validate(resolve(tiny(**fields)))]


def test_a_strategy_of_ones_own_is_planned_refused_by_its_own_words_and_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = polite(tmp_path)
    flags = {"workload": "mlp", "sync": path, "replicas": "2,4"}
    plan = plans.from_flags(flags, settings=["options.polite.bucket_mib=0.0,1.0"])
    assert [cell.replicas for cell in plan.cells] == [2, 2, 4]
    (refused,) = plan.refused
    (problem,) = refused.problems
    assert problem.rule == "politeness"
    assert problem.reason == "bucket_mib = 1 of polite: 8 is a crowd"
    assert problem.remedy == "set bucket_mib = 0, as synchronous has it"
    assert main.main(["list", "sync", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["sync"]
    assert "polite" not in [member["name"] for member in listed], "only what ships is listed"
    records = {
        name: simulate(
            resolve(tiny(sync=name, replicas=2, clock="virtual", budget=Budget(steps=4))), tmp_path
        ).records
        for name in (path, "synchronous")
    }
    mine, theirs = (
        [one["steps"]["loss"] for one in records[name] if one["role"] == "worker"]
        for name in (path, "synchronous")
    )
    assert mine == theirs and mine[0]


def test_the_smallest_number_of_replicas_is_what_a_member_declares(tmp_path: Path) -> None:
    path = polite(tmp_path)
    assert reasons(sync=path, replicas=1) == [
        "replicas = 1 with sync = polite: at least 2 are needed"
    ]
    assert reasons(sync=path, replicas=2) == []


def test_a_strategy_of_ones_own_has_its_own_label_and_colour(tmp_path: Path) -> None:
    cell = resolve(tiny(sync=polite(tmp_path), replicas=2, topology="ring"))
    (row,) = naming.describe([cell]).to_dict("records")
    assert row["series"] == "polite/ring"
    assert labels.label("polite/ring") == "Polite mean, ring"
    assert labels.short("polite/ring") == "polite ring"
    assert style.looks(["polite/ring"])["polite/ring"].color == "#123456"
    assert style.families(["polite"])["polite"].color == "#123456"
    assert labels.label("never_seen/ring") == "never seen, ring"
    assert style.families(["never_seen"])["never_seen"].color != "#123456"


def test_the_kind_of_a_topology_of_ones_own_decides_who_goes_with_it(tmp_path: Path) -> None:
    graph = own(tmp_path, ring, "circle", '    kind = "graph"\n', "kind")
    assert reasons(sync="gossip", topology=graph, replicas=2) == []
    (refused,) = reasons(sync="synchronous", topology=graph, replicas=2)
    assert refused.endswith("such a topology has no such mean")
    collective = own(tmp_path, ring, "chain", '    kind = "collective"\n', "kind")
    assert reasons(sync="synchronous", topology=collective, replicas=2) == []
    assert reasons(sync="gossip", topology=collective, replicas=2) == [
        "sync = gossip over topology = chain: it mixes with the neighbours of a graph"
    ]
    server = own(tmp_path, ring, "till", '    kind = "server"\n', "kind")
    assert resolve(tiny(sync="asynchronous", topology=server, replicas=2)).servers == 1
    assert resolve(tiny(topology=collective, replicas=2)).servers == 0


def test_a_compression_of_ones_own_says_where_it_travels(tmp_path: Path) -> None:
    declares = '    travels_over = ("graph", "native")\n    travels_why = "it is shy"\n'
    path = own(tmp_path, fp16, "shy", declares)
    (problem,) = rules.validate(resolve(tiny(compression=path, topology="ring", replicas=2)))
    assert problem.reason == "compression = shy over topology = ring: it is shy"
    assert problem.remedy == "set topology to native, or compression = none"
    assert reasons(compression=path, topology="native", replicas=2) == []


def test_a_new_rule_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = rules.validate(Cell(replicas=3))
    assert "threes" not in [problem.rule for problem in shipped]
    (tmp_path / "no_threes.py").write_text(user_file("no_threes"))
    monkeypatch.setattr(rules, "FOLDERS", (rules.HERE, tmp_path))
    found = rules.validate(Cell(replicas=3))
    assert [problem.rule for problem in found] == ["threes", *(each.rule for each in shipped)]
    assert rules.validate(Cell(replicas=2)) == []


def test_every_file_of_rules_is_found_and_in_the_order_of_its_place() -> None:
    places = [getattr(one, "__module__", "") for one in rules.found_in(rules.FOLDERS)]
    modules = list(dict.fromkeys(places))
    assert (
        modules[0] == "benchsuite.rules.combinations" and modules[-1] == "benchsuite.rules.setting"
    )
    files = [path for path in rules.HERE.glob("*.py") if "\nRULES" in path.read_text()]
    assert len(modules) == len([path for path in files if path.stem != "__init__"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('survives = "wroker"', "unknown value of survives 'wroker'; did you mean 'worker'?"),
        ('topologies = ("grpah",)', "unknown value of topologies 'grpah'; did you mean 'graph'?"),
        ('topologies = "graph"', "topologies = 'graph': a tuple of texts"),
        ("by_arrival = 1", "by_arrival = 1: True or False is needed"),
        ("smallest_replicas = True", "smallest_replicas = True: an integer is needed"),
        ("label = 3", "label = 3: a text is needed"),
        ('colour = "red"', "colour = 'red': a place in the palette, 0 to 9, or a text like"),
        ("colour = 10", "colour = 10: a place in the palette"),
        ('at_least = {"tempoo": 1}', "unknown option 'tempoo' of mine; did you mean 'tempo'?"),
        ('at_least = {"tempo": "one"}', "at_least = {'tempo': 'one'}: a table"),
        ('topologies_why = "{1 +}"', "topologies_why: '1 +' is no expression"),
        ('refuses = ({"rule": "r"},)', "it needs exactly the keys rule, when, reason, remedy"),
        ('refuses = "never"', "refuses = 'never': a tuple of tables"),
    ],
)
def test_a_value_outside_the_vocabulary_is_refused_with_file_value_and_what_is_allowed(
    tmp_path: Path, line: str, says: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"class Strategy:\n    tempo: int = 1\n    {line}\n")
    with pytest.raises(PluginError) as caught:
        declared.of("sync", str(path))
    assert str(caught.value).startswith(str(path)) and says in str(caught.value)


@pytest.mark.parametrize(
    ("when", "says"),
    [
        ("tempoo > 1", "unknown name 'tempoo' of mine; did you mean 'tempo'?"),
        ("cell.replcas > 1", "unknown field 'replcas' of cell; did you mean 'replicas'?"),
        ("wrld.size > 1", "unknown name 'wrld'"),
        ("__import__('os')", "is not allowed in a condition"),
        ("cell.replicas >", "is no expression"),
        ("[x for x in (1, 2)]", "is not allowed in a condition"),
        ("cell.options.get", "is not allowed in a condition"),
    ],
)
def test_a_condition_that_cannot_be_evaluated_is_refused_with_its_file(
    tmp_path: Path, when: str, says: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "class Strategy:\n    tempo: int = 1\n    refuses = (\n"
        f'        {{"rule": "r", "when": {when!r}, "reason": "because", "remedy": "stop"}},\n    )\n'
    )
    with pytest.raises(PluginError) as caught:
        rules.validate(Cell(sync=str(path)))
    assert str(path) in str(caught.value) and says in str(caught.value)


def test_a_condition_that_needs_an_unknown_number_does_not_hold() -> None:
    values = {("cell", "steps"): None, ("rate", ""): 2.0, ("name", ""): "mine"}

    def holds(text: str) -> bool:
        return conditions.expression(text).holds(lambda *name: values[name])

    assert holds("rate > 1") and holds("not rate <= 1") and holds("1 < rate < 3")
    assert holds("rate // 2 == 1 and max(rate, 3) == 3 and -rate < 0")
    assert not holds("cell.steps > 1") and not holds("not cell.steps > 1")
    assert not holds("1 / (rate - 2) > 0"), "a division by 0 is not known"
    assert holds('name in ("mine", "yours")') and not holds('name == "yours"')


def test_every_member_declares_what_the_vocabulary_allows_and_labels_are_one_each() -> None:
    """Also: whoever names topologies, hooks or votes does so of members that exist."""
    for axis in AXES:
        names = declared.members(axis)
        assert sorted(names) == plugins.names(axis)
        for name in names:
            says = declared.of(axis, name)
            assert isinstance(says, declared.KINDS[axis])
            if isinstance(says, declared.Strategy):
                assert set(says.compressions) <= set(declared.members("compression"))
                assert set(says.looks) <= set(declared.members("topology"))
                assert not says.simulate_instead or says.simulate_instead in names
        said = [declared.labels(name) for name in names]
        assert len(set(said)) == len(said), said


def test_an_edited_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text('class Strategy:\n    label = "one"\n')
    assert declared.of("sync", str(path)).label == "one"
    path.write_text('class Strategy:\n    label = "another"\n')
    assert declared.of("sync", str(path)).label == "another"


def test_a_member_that_is_gone_is_an_error_of_the_user_and_no_label(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown sync 'gosip'; did you mean 'gossip'?"):
        declared.of("sync", "gosip")
    assert declared.where_known("sync", str(tmp_path / "gone.py")) is None
    assert declared.where_known("sync", "gossip") is not None


# Who names a strategy beside its own file: (strategy, file) -> why.
NAMED_ELSEWHERE = {
    ("synchronous", "benchsuite/plan/cell.py"): "what a cell has where nothing is said",
    ("synchronous", "benchsuite/sync/diloco.py"): "its server waits for all as that one's does",
    ("synchronous", "benchsuite/sync/local_sgd.py"): "its server waits for all as that one's does",
    ("asynchronous", "benchsuite/sync/actor_learner.py"): "it declares what to simulate instead",
    ("synchronous", "benchsuite/report/words/answer.py"): "a sentence that compares these two",
    ("asynchronous", "benchsuite/report/words/answer.py"): "a sentence that compares these two",
    ("asynchronous", "benchsuite/report/words/limits.py"): "a sentence on its updates",
}
# They compare named cells: laws with their broken twins, programs with scripts written by hand.
COMPARE_NAMED_CELLS = ("benchsuite/laws/", "benchsuite/programs/")


def named_strategies(source: str, names: tuple[str, ...]) -> set[str]:
    """The strategies whose module a source imports, or whose name is a text of it.

    A name counts alone and as a part of `sync/topology`; sentences are no names.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(node.value.split("/"))
        elif isinstance(node, ast.ImportFrom) and node.module == "benchsuite.sync":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").removeprefix("benchsuite.sync."))
    return found & set(names)


def package_files() -> dict[str, str]:
    """Path -> text of every file of the package that does not compare named cells."""
    paths = [*(ROOT / "benchsuite").rglob("*.py"), *(ROOT / "workloads").glob("*.py")]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(paths)}
    return {path: text for path, text in texts.items() if not path.startswith(COMPARE_NAMED_CELLS)}


def test_a_strategy_is_named_in_its_own_file_only() -> None:
    names = declared.members("sync")
    found = set()
    for path, text in package_files().items():
        named = named_strategies(text, names)
        found |= {(name, path) for name in named if path != f"benchsuite/sync/{name}.py"}
    assert found == NAMED_ELSEWHERE.keys()


def test_not_even_a_sentence_names_gossip_but_those_on_its_graphs() -> None:
    """Its name is no other word of the field, so every mention of it counts."""
    naming = {path for path, text in package_files().items() if re.search(r"\bgossip\b", text)}
    graphs = {
        f"benchsuite/topology/{name}.py"
        for name in declared.members("topology")
        if declared.topology(name).kind == declared.GRAPH
    }
    assert naming - graphs == {"benchsuite/sync/gossip.py", "benchsuite/topology/__init__.py"}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("if cell.sync == 'gossip': pass", {"gossip"}),
        ("LOOKS = {'gossip/ring': 3}", {"gossip"}),
        ("from benchsuite.sync.gossip import Strategy", {"gossip"}),
        ("from benchsuite.sync import gossip as other", {"gossip"}),
        ("from benchsuite.sync import count", set()),
        ("print('workers gossip with each other')", set()),
    ],
)
def test_a_made_up_place_that_names_a_strategy_is_seen(source: str, found: set[str]) -> None:
    assert named_strategies(source, ("gossip", "diloco")) == found
