"""Tuning: one grid and as many trials for every strategy, kept; the best by the criterion; trials
are never results."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from benchsuite import rules
from benchsuite.analysis import cells as naming
from benchsuite.analysis.select import select
from benchsuite.cluster.rank_supervisor import _refusal
from benchsuite.errors import UsageError
from benchsuite.laws.harness import runs as law_runs
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.plan import cell, declared, fields
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.report import spec
from benchsuite.report.material import Material
from benchsuite.report.tables import table as all_numbers
from benchsuite.results import code_id
from benchsuite.results import tuned as tuned_cells
from benchsuite.results.columns import row
from benchsuite.results.record import Run, Status, new_run_id
from benchsuite.results.store import Store
from benchsuite.rules import plans
from benchsuite.running import api, forecast, tune
from benchsuite.running.progress import Lines
from benchsuite.running.runner import Tally, run_cells
from benchsuite.running.setting import Setting
from benchsuite.virtual import replay
from benchsuite.virtual.world import simulate
from tests import synthetic_runs as made
from tests.bench import TINY
from tests.test_store import SCHEMA

SETTING = Setting(
    machine=made.MACHINE, environment_id="e", code_id=lambda cell: "code", rules_id="rules"
)
SERVER = {"topology": "parameter_server", "replicas": 2}
CELLS = [
    Cell(tuning="per_strategy", topology="ring", replicas=2),
    Cell(tuning="per_strategy", **SERVER),
    Cell(tuning="per_strategy", sync="asynchronous", **SERVER),
    Cell(topology="ring", replicas=2),
]
NAMES = ("ring", "server", "asynchronous")
BEST = {
    ("synchronous", "ring"): 2.0,
    ("synchronous", "parameter_server"): 0.5,
    ("asynchronous", "parameter_server"): 0.25,
}


def outcome(
    of: Cell,
    samples: int | None,
    metric: float | None = 90.0,
    *,
    lower: bool = False,
    **changes: Any,
) -> Run:
    """A made-up run with these numbers."""
    run = made.make_run(of, of.seed)
    target = {**run.result["target"], "direction": "min" if lower else "max"}
    result = {
        **run.result,
        "samples_to": {"target": samples},
        "final_metric": metric,
        "target": target,
    }
    return dataclasses.replace(
        run, **{"code_id": "code", "result": result, "run_id": new_run_id(), **changes}
    )


def lost(of: Cell) -> Run:
    return outcome(
        of, None, status=Status.FAILED, reason="rank 1 was killed", result={}, cost={}, raw={}
    )


def diverged(of: Cell, samples: int | None = None) -> Run:
    run = outcome(of, samples, 99.0)
    return dataclasses.replace(run, result={**run.result, "diverged_step": 7})


def arrives_with_its_own_rate(of: Cell) -> Run:
    """Each strategy is fastest with another factor."""
    best = BEST[of.sync, of.topology]
    return outcome(of, 3200 if of.lr_factor == best else 6400)


class Machine:
    """What launches cells, and remembers what it was given."""

    def __init__(self, answer: Callable[[Cell], Run] = arrives_with_its_own_rate) -> None:
        self.launched: list[Cell] = []
        self.answer = answer

    def launch(self, of: Cell) -> Run:
        assert of.tuning == "same", "a rank is never given a tuned cell"
        self.launched.append(of)
        return self.answer(of)

    def simulate(self, given: Sequence[Cell]) -> Iterator[tuple[Cell, Run]]:
        yield from ((each, self.launch(each)) for each in given)

    @property
    def num_trials(self) -> Counter[tuple[str, str]]:
        return Counter(
            (each.sync, each.topology) for each in self.launched if each.seed == tune.TRIAL_SEED
        )


def with_seeds(given: Sequence[Cell], seeds: Sequence[int] = (0, 1)) -> list[Cell]:
    return [each.with_seed(seed) for seed in seeds for each in given]


def run(store: Store, machine: Machine, given: Sequence[Cell], **options: Any) -> Tally:
    return run_cells(given, store, setting=SETTING, launch=machine.launch, **options)


def tuned_runs(store: Store) -> dict[tuple[str, str, int], Mapping[str, Any]]:
    found = {}
    for each in store.runs():
        if each.cell.tuning == "per_strategy":
            found[each.cell.sync, each.cell.topology, each.cell.seed] = each.result["tuning"]
    return found


# the grid


@pytest.mark.parametrize("asked", CELLS[:3], ids=NAMES)
def test_trials_differ_from_their_cell_in_the_learning_rate_and_the_seed_alone(asked: Cell) -> None:
    tried = tune.trials(asked.with_seed(3))
    assert [each.lr_factor for each in tried] == list(tune.LR_FACTORS)
    for each in tried:
        assert each == dataclasses.replace(
            asked, tuning="same", lr_factor=each.lr_factor, seed=tune.TRIAL_SEED
        )
    assert tune.trials(dataclasses.replace(asked, tuning="same")) == []


def test_every_strategy_is_tried_as_often_and_runs_with_what_suits_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    machine = Machine()
    tally = run(store, machine, with_seeds(CELLS))
    assert machine.num_trials == dict.fromkeys(BEST, len(tune.LR_FACTORS))
    assert (tally.counts[Status.OK], tally.exit_code) == (15 + 8, 0)
    chosen = tuned_runs(store)
    assert {key: tuning["lr_factor"] for key, tuning in chosen.items()} == {
        (*strategy, seed): factor for strategy, factor in BEST.items() for seed in (0, 1)
    }
    ran = [each for each in machine.launched if each.seed != tune.TRIAL_SEED]
    for strategy, factor in BEST.items():
        wanted = (
            [1.0, factor] if strategy == ("synchronous", "ring") else [factor]
        )  # one cell is not tuned
        assert sorted(
            {each.lr_factor for each in ran if (each.sync, each.topology) == strategy}
        ) == sorted(wanted)


def test_trials_come_before_all_cells_and_are_said_to_be_trials(tmp_path: Path) -> None:
    machine = Machine()
    stream = io.StringIO()
    run(Store(tmp_path), machine, with_seeds(CELLS), progress=Lines(stream))
    assert [each.seed == tune.TRIAL_SEED for each in machine.launched] == [True] * 15 + [False] * 8
    lines = stream.getvalue().splitlines()
    assert lines[0] == "23 to run (first 15 trials of tuning), 0 stored, 0 refused"
    assert ["trial of" in line for line in lines[1:]] == [True] * 15 + [False] * 8
    assert any(
        "] trial of cnn synchronous ring N=2 lr x0.25 seed 1000: ok" in line for line in lines
    )
    assert any("] cnn synchronous ring N=2 tuned seed 0: ok" in line for line in lines)


# the cache


def test_what_is_stored_is_neither_tried_nor_run_again_unless_fresh(tmp_path: Path) -> None:
    store = Store(tmp_path)
    machine = Machine()
    run(store, machine, with_seeds(CELLS))
    assert run(store, Machine(lambda of: pytest.fail(of.label)), with_seeds(CELLS)).stored == 8
    more = Machine()
    run(store, more, with_seeds(CELLS, seeds=[0, 1, 2]))
    assert (len(more.launched), more.num_trials) == (4, {}), "another seed needs no further trial"
    fresh = Machine()
    run(store, fresh, with_seeds(CELLS), fresh=True)
    assert fresh.num_trials == machine.num_trials and len(fresh.launched) == 15 + 8


def test_an_interrupt_among_the_trials_keeps_them(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def interrupted(of: Cell) -> Run:
        if len(store.runs()) == 7:
            raise KeyboardInterrupt
        return arrives_with_its_own_rate(of)

    assert run(store, Machine(interrupted), with_seeds(CELLS)).interrupted
    after = Machine()
    run(store, after, with_seeds(CELLS))
    assert after.num_trials.total() == 15 - 7 and len(tuned_runs(store)) == 6


def test_the_seeds_of_a_cell_share_one_choice_whatever_a_trial_says_later(tmp_path: Path) -> None:
    """A trial that failed is tried again like every failed run, but not for a cell that has a
    choice."""
    store = Store(tmp_path)
    asked = CELLS[:1]

    def fails_with_the_best(of: Cell) -> Run:
        return (
            lost(of) if of.lr_factor == 2.0 else outcome(of, 3200 if of.lr_factor == 0.5 else 6400)
        )

    run(store, Machine(fails_with_the_best), with_seeds(asked, seeds=[0]))
    later = Machine()
    run(store, later, with_seeds(asked))
    assert later.num_trials.total() == 0
    assert [tuning["lr_factor"] for tuning in tuned_runs(store).values()] == [0.5, 0.5]


def test_editing_the_way_of_tuning_makes_tuned_runs_missing_and_no_others() -> None:
    tuned = resolve(CELLS[0])
    same = resolve(CELLS[3])
    tree = code_id.Tree()
    assert tune.__name__ in tree.reach(tuned) - tree.reach(same)
    assert (
        tree.code_id(tuned_cells.with_factor(tuned, 0.5))
        == tree.code_id(same)
        != tree.code_id(tuned)
    )


def test_trials_of_other_code_do_not_choose(tmp_path: Path) -> None:
    store = Store(tmp_path)
    asked = CELLS[0]
    for each in tune.trials(asked):
        store.write(outcome(each, 320 if each.lr_factor == 4.0 else None, code_id="older"))
    machine = Machine()
    run(store, machine, [asked])
    assert machine.num_trials.total() == 5
    assert [tuning["lr_factor"] for tuning in tuned_runs(store).values()] == [2.0]


# the choice


@pytest.mark.parametrize(
    ("wanted", "trials", "why"),
    [
        (
            0.5,
            {0.25: (960, 99.0), 0.5: (640, 91.0), 1: (960, 92.0), 2: (None, 95.0)},
            "fewest samples to target",
        ),
        (
            2.0,
            {0.5: (640, 91.0), 1: (640, 92.0), 2: (640, 93.0), 4: (960, 99.0)},
            "then the better final metric",
        ),
        (
            4.0,
            {0.25: (None, 10.0), 1: (None, 20.0), 4: (None, 30.0)},
            "all miss: the better final metric",
        ),
        (
            1.0,
            {0.25: (640, 91.0), 0.5: (640, 91.0), 1: (640, 91.0), 2: (640, 91.0)},
            "then the factor nearest to 1",
        ),
        (
            0.5,
            {0.25: (640, 91.0), 0.5: (640, 91.0), 2: (640, 91.0), 4: (640, 91.0)},
            "the smaller of two",
        ),
        (
            0.25,
            {0.25: (None, 10.0), 1: "diverged", 2: "diverged early", 4: "failed"},
            "one that diverged or failed loses",
        ),
        (
            1.0,
            {0.5: "diverged", 1: "diverged early", 2: "diverged"},
            "all diverged: the factor nearest to 1",
        ),
        (
            2.0,
            {0.5: "failed", 2: "diverged", 4: "absent"},
            "one that failed says less than one that diverged",
        ),
        (2.0, {0.5: (None, None), 2: (None, 3.0)}, "a metric is better than none"),
        (None, {0.5: "failed", 1: "absent"}, "none is ok"),
    ],
)
@pytest.mark.parametrize("lower", [False, True], ids=["higher is better", "lower is better"])
def test_the_best_trial_is_chosen(
    wanted: float | None, trials: dict[float, Any], why: str, lower: bool
) -> None:
    tried: list[tuple[Cell, Run | None]] = []
    for factor, told in trials.items():
        of = tuned_cells.with_factor(CELLS[0], factor).with_seed(tune.TRIAL_SEED)
        words = {
            "failed": lost(of),
            "diverged": diverged(of),
            "diverged early": diverged(of, 320),
            "absent": None,
        }
        if isinstance(told, str):
            tried.append((of, words[told]))
        else:
            sign = -1 if lower else 1
            tried.append(
                (of, outcome(of, told[0], None if told[1] is None else sign * told[1], lower=lower))
            )
    for order in (tried, tried[::-1]):
        choice = tune.choose(order)
        assert choice["lr_factor"] == wanted, why
    assert choice["criterion"] == tune.CRITERION and choice["trial_seed"] == tune.TRIAL_SEED


def test_a_cell_without_an_ok_trial_fails_and_names_them(tmp_path: Path) -> None:
    store = Store(tmp_path)
    given = with_seeds([CELLS[0], CELLS[3]], seeds=[0])
    for clock in ("wall", "virtual"):
        asked = [dataclasses.replace(each, clock=clock) for each in given]
        machine = Machine(lambda of: lost(of) if of.seed == tune.TRIAL_SEED else outcome(of, 640))
        tally = run(store, machine, asked, simulate=machine.simulate)
        assert (tally.counts[Status.FAILED], tally.counts[Status.OK], tally.exit_code) == (
            5 + 1,
            1,
            4,
        )
        (failed,) = store.runs(asked[:1])
        assert failed.status is Status.FAILED and failed.reason is not None
        for each in tune.trials(asked[0]):
            assert f"{each.id} (lr x{each.lr_factor:g}) failed: rank 1 was killed" in failed.reason
        jsonschema.validate(failed.to_json(), SCHEMA)
        again = Machine()
        run(store, again, asked, simulate=again.simulate)
        assert again.num_trials.total() == 5
        assert {each.status for each in store.runs(asked[:1])} == {Status.FAILED, Status.OK}


# what a run file and a page say


def test_a_run_file_keeps_the_cell_as_asked_and_says_what_was_tried(tmp_path: Path) -> None:
    store = Store(tmp_path)
    asked = CELLS[2].with_seed(1)
    run(store, Machine(), [asked])
    (stored,) = store.runs([asked])
    assert (stored.cell, stored.cell_id, stored.code_id) == (asked, asked.id, "code")
    tuning = stored.result["tuning"]
    assert [(each["lr_factor"], each["cell_id"]) for each in tuning["trials"]] == [
        (each.lr_factor, each.id) for each in tune.trials(asked)
    ]
    assert [each["samples_to_target"] for each in tuning["trials"]] == [
        3200,
        6400,
        6400,
        6400,
        6400,
    ]
    assert tuned_cells.trained(stored) == tuned_cells.with_factor(asked, 0.25)
    for each in store.runs():
        jsonschema.validate(json.loads(json.dumps(each.to_json())), SCHEMA)
    values = row(stored)
    assert (values["tuning"], values["lr_factor"], values["tuned_lr_factor"]) == (
        "per_strategy",
        1.0,
        0.25,
    )
    trial = row(store.runs([tune.trials(asked)[1]])[0])
    assert (trial["tuning"], trial["lr_factor"], trial["tuned_lr_factor"], trial["seed"]) == (
        "same",
        0.5,
        None,
        1000,
    )


def test_a_page_never_selects_a_trial(tmp_path: Path) -> None:
    """The trial with factor 1 has the id of the cell that is not tuned: its seed tells them
    apart."""
    store = Store(tmp_path)
    run(store, Machine(), with_seeds(CELLS))
    assert CELLS[3].id in {each.id for each in tune.trials(CELLS[0])}
    selection = select(CELLS, (0, 1), store.runs())
    assert len(selection.runs) == 8 and not selection.absent and not selection.repeats
    assert {each.cell.seed for each in selection.runs} == {0, 1}


@pytest.mark.parametrize(
    ("best", "said"), [(0.5, "lr x0.5 of 5 tried"), (4.0, "lr x4 of 5 tried: the edge of the grid")]
)
def test_the_table_says_which_rate_was_chosen_and_where_the_grid_ended(
    tmp_path: Path, best: float, said: str
) -> None:
    store = Store(tmp_path)
    given = [dataclasses.replace(CELLS[0], preset="digits"), Cell(topology="ring", replicas=2)]
    run(
        store,
        Machine(lambda of: outcome(of, 320 if of.lr_factor == best else 640)),
        with_seeds(given),
    )
    of = Material(given, (0, 1), select(given, (0, 1), store.runs()), [made.ENVIRONMENT])
    (figure,) = spec.parse([{"kind": "table", "where": {"tuning": "per_strategy"}}])
    (tuned,) = all_numbers.tabulate(figure, of).rows
    assert tuned[-1].plain == said


def test_tuned_series_are_told_apart_where_the_plan_has_both() -> None:
    both = naming.describe(CELLS)
    assert list(both["series"]) == [
        "synchronous/ring tuned",
        "synchronous/parameter_server tuned",
        "asynchronous/parameter_server tuned",
        "synchronous/ring",
    ]
    assert list(naming.describe(CELLS[:3])["series"]) == [
        name.removesuffix(" tuned") for name in both["series"][:3]
    ]
    factors = naming.describe([Cell(replicas=2), Cell(replicas=2, lr_factor=0.5)])
    assert list(factors["variant"]) == ["lr_factor=1", "lr_factor=0.5"]
    (figure,) = spec.parse([{"kind": "table", "where": {"tuning": "per_strategy"}}])
    assert [figure.wants(each) for each in CELLS] == [True, True, True, False]


def test_a_tuned_asynchronous_run_is_replayed_with_its_own_factor() -> None:
    of = dataclasses.replace(CELLS[2], options={"asynchronous": {"lock": "exclusive"}})
    stored = outcome(of, 640)
    stored = dataclasses.replace(stored, result={**stored.result, "tuning": {"lr_factor": 0.25}})
    assert replay.in_virtual_time(tuned_cells.trained(stored)).lr_factor == 0.25


# before anything runs


def test_a_dry_run_counts_trials_and_knows_their_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = {"workload": "cnn", "preset": "smoke", "topology": "ring", "replicas": "2"}
    grid = plans.from_flags(flags, settings=["tuning=same,per_strategy"], seeds=[0, 1])
    store = Store(tmp_path)
    document = forecast.forecast(grid, store, code_id="code")
    assert (document["runs"], document["trials"], document["missing"]) == (4 + 5, 5, 4 + 5)
    assert [(each["missing"], each["trials"]) for each in document["cells"]] == [(2, 0), (2, 5)]
    text = forecast.table(document)
    assert (
        "2/2 + 5 trials" in text
        and "9 runs (2 cells, seeds 0, 1; 5 of them trials of tuning, seed 1000)" in text
    )
    run_cells(
        grid.runs(),
        store,
        setting=SETTING,
        launch=lambda of: dataclasses.replace(outcome(of, 64), cost={"wall_s": 3.0}),
    )
    document = forecast.forecast(grid, store, code_id="code")
    assert (document["runs"], document["missing"], document["estimated_s"]) == (9, 0, 0)
    document = forecast.forecast(grid, store, code_id="newer")
    assert (document["missing"], document["estimated_s"]) == (9, 27.0)


def test_the_seed_of_the_trials_is_no_seed_of_a_tuned_plan(tmp_path: Path) -> None:
    grid = plans.from_flags(
        {"workload": TINY, "topology": "ring"}, settings=["tuning=per_strategy"], seeds=[0, 1000]
    )
    with pytest.raises(
        UsageError, match="seeds contain 1000, which trials .* take another seed, or tuning = same"
    ):
        api.run(grid, results=tmp_path)
    tune.check_seeds([Cell()], [1000])


def test_a_torchrun_of_ones_own_is_given_no_tuned_cell(tmp_path: Path) -> None:
    settings = ["tuning=same,per_strategy", "cluster=torchrun"]
    grid = plans.from_flags({"workload": "cnn", "topology": "ring"}, settings=settings)
    with pytest.raises(UsageError, match="--only 'tuning == same'"):
        forecast.write_cells(grid, tmp_path / "cells.json")
    grid = plans.from_flags(
        {"workload": "cnn", "topology": "ring"}, settings=settings, only="tuning == same"
    )
    forecast.write_cells(grid, tmp_path / "cells.json")
    assert "only `benchsuite run`" in _refusal(CELLS[0], 2) and _refusal(CELLS[3], 2) == ""


@pytest.mark.parametrize("value", ["fast", float("nan"), True, None])
def test_a_factor_is_a_number(value: Any) -> None:
    with pytest.raises(UsageError, match="lr_factor takes a number"):
        fields.checked(Cell(lr_factor=value))


def test_a_factor_of_one_is_the_cell_without_it() -> None:
    assert resolve(Cell(lr_factor=1)).id == resolve(Cell()).id != resolve(Cell(lr_factor=2.0)).id
    assert Cell(lr_factor=0.5).label.endswith("N=1 lr x0.5")
    assert "lr_factor" not in cell.identity(Cell()) and "lr_factor" in cell.identity(
        Cell(lr_factor=2)
    )


# what it does to training


def trained(lr: float, factor: float, **changes: Any) -> Cell:
    options = {"tiny": {"lr": lr}}
    return resolve(
        Cell(workload=TINY, options=options, lr_factor=factor, precision="fp64", **changes)
    )


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_twice_the_factor_is_twice_the_learning_rate_bit_for_bit(optimizer: str) -> None:
    one, two, plain = (
        law_runs.run(
            thread_ranks,
            law_runs.with_options(
                trained(lr, factor, replicas=2, topology="ring"), "tiny", optimizer=optimizer
            ),
        )
        for lr, factor in ((0.02, 2.0), (0.04, 1.0), (0.02, 1.0))
    )
    for mine, theirs, other in zip(one.workers, two.workers, plain.workers, strict=True):
        assert torch.equal(mine.params[-1], theirs.params[-1])
        assert not torch.equal(mine.params[1], other.params[1])


def _companions(sync: str) -> Cell | None:
    """A cell of the virtual clock with this strategy."""
    for topology in declared.members("topology"):
        made_ = trained(
            0.01,
            2.0,
            sync=sync,
            topology=topology,
            replicas=2,
            clock="virtual",
            budget=Budget(steps=8),
        )
        if not rules.validate(made_):
            return made_
    return None


@pytest.mark.parametrize("sync", [name for name in declared.members("sync") if _companions(name)])
def test_the_factor_reaches_every_strategy_alike(sync: str, tmp_path: Path) -> None:
    """The same losses as with the doubled learning rate, and other ones than without."""
    asked = _companions(sync)
    assert asked is not None
    doubled = dataclasses.replace(asked, lr_factor=1.0)
    losses = []
    for of in (asked, law_runs.with_options(doubled, "tiny", lr=0.02), doubled):
        records = simulate(of, tmp_path).records
        losses.append([record["steps"]["loss"] for record in records if record["role"] == "worker"])
    assert losses[0] == losses[1] != losses[2], sync


@pytest.mark.procs
@pytest.mark.timeout(110)
def test_tuned_cells_of_the_virtual_clock_from_end_to_end(tmp_path: Path) -> None:
    """Trials in simulators, the choice from their files, runs with it; what equals the untuned run
    is not run twice."""
    store = Store(tmp_path)
    given = []
    for sync in ("synchronous", "asynchronous"):
        for tuning in ("same", "per_strategy"):
            given.append(
                Cell(
                    workload=TINY,
                    sync=sync,
                    **SERVER,
                    clock="virtual",
                    tuning=tuning,
                    budget=Budget(steps=10),
                    options={"tiny": {"optimizer": "sgd", "lr": 0.02}},
                    compute_time={"kind": "exponential", "mean_s": 0.01},
                )
            )
    tally = api.run(given, results=tmp_path, seeds=[0, 1])
    assert (tally.counts[Status.OK], tally.exit_code) == (4 * 2 + 2 * 5, 0), tally.failures
    for asked in (resolve(each) for each in given if each.tuning == "per_strategy"):
        tried = {
            each.cell.lr_factor: each
            for each in store.runs(tune.trials(asked), seeds=[tune.TRIAL_SEED])
        }
        for stored in store.runs([asked]):
            tuning = stored.result["tuning"]
            assert tuning == tune.choose(
                [(each, tried[each.lr_factor]) for each in tune.trials(asked)]
            )
            again = simulate(tuned_cells.trained(stored), tmp_path / "again")
            losses = [
                record["steps"]["loss"] for record in again.records if record["role"] == "worker"
            ]
            ran = law_losses(stored)
            assert sorted(ran) == pytest.approx(sorted(ran_of(losses, asked)), rel=1e-6), tuning[
                "lr_factor"
            ]
            jsonschema.validate(stored.to_json(), SCHEMA)
    assert api.run(given, results=tmp_path, seeds=[0, 1]).stored == 8
    assert len(store.runs()) == 18


def law_losses(stored: Run) -> list[float]:
    return [loss for loss in stored.result["loss"] if loss is not None]


def ran_of(losses: list[list[float]], of: Cell) -> list[float]:
    """As the run file states them: of workers that step together the mean, else each push."""
    if of.sync == "synchronous":
        return [sum(step) / len(step) for step in zip(*losses, strict=True)]
    return [loss for worker in losses for loss in worker]


@pytest.mark.parametrize(("chosen", "num_simulated"), [(1.0, 1), (0.5, 2)])
def test_in_virtual_time_what_is_trained_the_same_way_is_simulated_once(
    tmp_path: Path, chosen: float, num_simulated: int
) -> None:
    store = Store(tmp_path)
    machine = Machine(lambda of: outcome(of, 320 if of.lr_factor == chosen else 640))
    same, tuned = (
        Cell(clock="virtual", tuning=tuning, topology="ring", replicas=2)
        for tuning in ("same", "per_strategy")
    )
    run(store, machine, [same, tuned], simulate=machine.simulate)
    assert len(machine.launched) - machine.num_trials.total() == num_simulated
    (one,), (other,) = store.runs([same], seeds=[0]), store.runs([tuned])
    assert one.run_id != other.run_id and other.cell == tuned
    assert (one.result["loss"] == other.result["loss"]) and "tuning" not in one.result
