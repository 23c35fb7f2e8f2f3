"""`selfcheck`: verdicts by hand, a slowed harness is a miss, every check runs at a tiny size. No
wall-clock figure is asserted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchsuite.errors import UsageError
from benchsuite.plan import plugins
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.programs.bars import Figure, exit_code, interval, judge
from benchsuite.programs.bench import Bench, Launch
from benchsuite.programs.selfcheck import (
    cells,
    codecs,
    collectives,
    compression,
    files,
    parallel,
    selfcheck,
    simulations,
    virtual,
)
from benchsuite.programs.selfcheck.cells import Effort
from benchsuite.virtual.gradients import CLOSE

TINY = Effort(
    launches=2,
    pairs=1,
    steps=4,
    warmup=1,
    idle_steps=20,
    ring_repetitions={4096: 2, 1 << 20: 2},
    server_updates={400: 8, 4000: 4},
)


# -- verdicts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "bar", "better", "contended", "says"),
    [
        ([0.30, 0.31, 0.32, 0.33, 0.34], 0.4, "lower", True, "pass"),
        ([0.50, 0.51, 0.52, 0.53, 0.54], 0.4, "lower", False, "miss"),
        ([0.50, 0.51, 0.52, 0.53, 0.54], 0.4, "lower", True, "too noisy"),  # who knows whose fault
        ([0.98, 0.99, 1.00, 1.01, 1.02], 0.97, "higher", True, "pass"),
        ([0.80, 0.81, 0.82, 0.83, 0.84], 0.97, "higher", False, "miss"),
        ([0.7, 0.9, 1.0, 1.1, 1.3], 0.97, "higher", True, "too noisy"),
        ([0.7, 0.9, 1.0, 1.1, 1.3], 0.97, "higher", False, "pass"),  # quiet: the median decides
        ([0.7, 0.9, 0.95, 1.1, 1.3], 0.97, "higher", False, "miss"),
        ([0.3, 0.5], 0.4, "lower", True, "too noisy"),  # a range of two
        ([0.97], 0.97, "higher", True, "pass"),  # exactly the bar
        ([0.4], 0.4, "lower", True, "pass"),
        (
            [-3.0, 1.0, 2.0, 3.0, 9.0],
            5.0,
            "lower",
            False,
            "pass",
        ),  # negative values have a range, no logs
    ],
)
def test_a_bar_is_held_against_the_median_and_its_interval(
    points: list[float], bar: float, better: Any, contended: bool, says: str
) -> None:
    assert judge(points, bar, better=better, contended=contended) == says, interval(points)


def test_a_verdict_needs_values() -> None:
    for points in ([], [math.nan]):
        with pytest.raises(ValueError, match="needs values"):
            judge(points, 1.0, better="lower")


def test_a_figure_without_bar_or_values_says_so() -> None:
    figure = Figure(item="i", quantity="q", unit="s")
    assert figure.verdict == "not run" and figure.to_json()["median"] is None
    assert replace(figure, points=[1.0]).verdict == "-"
    assert replace(figure, points=[1.0], bar=2.0).verdict == "pass"


def test_others_make_a_figure_contended_above_five_percent() -> None:
    noisy = Figure(item="i", quantity="q", unit="s", points=[1.0, 3.0], bar=2.5)
    assert [replace(noisy, foreign=share).verdict for share in (None, 0.05, 0.06)] == [
        "pass",
        "pass",
        "too noisy",
    ]


def test_the_exit_code_is_that_of_the_worst_verdict() -> None:
    cases = {
        ("pass", "-", "not run"): 0,
        ("pass", "too noisy"): 3,
        ("too noisy", "miss", "pass"): 1,
        (): 0,
    }
    assert {verdicts: exit_code(verdicts) for verdicts in cases} == cases


def test_the_table_shows_figure_interval_bar_verdict_and_note() -> None:
    figures = [
        Figure(
            item="a", quantity="one", unit="s", points=[0.1, 0.2, 0.3], bar=0.4, note="made of this"
        ),
        Figure(
            item="b",
            quantity="two",
            unit="",
            points=[0.98, 0.99],
            bar=0.97,
            better="higher",
            foreign=0.5,
        ),
        Figure(item="c", quantity="three", unit="us"),
    ]
    lines = selfcheck.table({"figures": [figure.to_json() for figure in figures]}).splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["one", "0.200", "s", "0.100", "..", "0.300", "3", "<=", "0.400", "s", "pass"],
        ["made", "of", "this"],
        ["two", "0.985", "0.980", "..", "0.990", "2", ">=", "0.970", "pass*"],
        ["three", "0", "not", "run"],
    ]
    assert "50 %" in lines[-1]


def test_the_help_lists_every_item() -> None:
    alone = ("virtual", "store", "report")
    assert ("commands", *selfcheck.WITH_RANKS, *alone) == selfcheck.ITEMS


def test_an_unknown_item_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="harness"):
        selfcheck.run("harnes")
    with pytest.raises(UsageError, match="at least 2"):
        selfcheck.run("commands", launches=1)


# -- step times and phases, from records made by hand ----------------------------------------------


def ranks_of(*step_us: list[int]) -> list[dict[str, Any]]:
    """Rank records in which step k of each rank takes so many microseconds."""
    ranks = []
    for durations in step_us:
        start = [1_000_000 * step for step in range(len(durations))]
        end = [at + 1000 * us for at, us in zip(start, durations, strict=True)]
        ranks.append(
            {"steps": {"start_ns": start, "end_ns": end, "loss": [1.0] * len(start)}, "cpu_s": 1.0}
        )
    return ranks


def test_a_step_takes_as_long_as_its_slowest_rank_and_warm_up_is_dropped() -> None:
    assert cells.step_us(ranks_of([900, 10, 20, 30], [1, 30, 10, 10]), warmup=1) == 30


class Recorded:
    """A bench whose launches are records made by hand: ours is `slow_down` times as slow as the
    script."""

    def __init__(self, slow_down: float, loss: float = 1.0) -> None:
        self.slow_down = slow_down
        self.loss = loss
        self.order = ""

    def launch(self, cell: Cell, entry: str = cells.RANK_ENTRY) -> Launch:
        ours = entry == cells.RANK_ENTRY
        self.order += "A" if ours else "B"
        ranks = ranks_of([round(1000 * (self.slow_down if ours else 1))] * 4)
        ranks[0]["steps"]["loss"] = [self.loss if ours else 1.0]
        return Launch(ranks, 0, 0)


def compared(slow_down: float, **more: float) -> tuple[list[Figure], Recorded]:
    bench = Recorded(slow_down, **more)
    cell = resolve(Cell())
    effort = Effort(launches=3, pairs=2, warmup=0)
    return list(cells.against_script(bench, cell, "flat_loop", effort, name="x")), bench  # type: ignore[arg-type]


def test_a_slowed_harness_is_a_miss_and_an_equal_one_passes() -> None:
    (ratio, _, added), _ = compared(1.0)
    assert (ratio.verdict, list(added.points)) == ("pass", [0.0] * 6)
    (ratio, _, added), _ = compared(1.05)
    ratio = replace(ratio, foreign=0.0)
    assert (ratio.verdict, list(added.points)) == ("miss", [50.0] * 6)


def test_worker_and_script_take_turns_in_the_order_abba() -> None:
    _, bench = compared(1.0)
    assert bench.order in ("ABBAABBAABBA", "BAABBAABBAAB")


def test_loops_that_do_not_do_the_same_work_are_not_compared() -> None:
    with pytest.raises(RuntimeError, match="same work"):
        compared(1.0, loss=1.1)


def test_phases_add_up_to_the_cell_less_its_loop() -> None:
    marks = {"entered": 10, "connected": 20, "built": 40, "left_loop": 80, "evaluated": 90}
    late = {name: value + 1 for name, value in marks.items()}
    ranks = [
        {"marks_ns": marks, "start_ns": 50, "end_ns": 70},
        {"marks_ns": late, "start_ns": 50, "end_ns": 72},
    ]
    phases = cells.phases(Launch(ranks, 0, 100))
    assert round(sum(phases.values()) * 1e9) == 100 - (72 - 50), phases


# -- everything once, tiny -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench(cells.MODULES) as bench:
        yield bench


@pytest.mark.procs
@pytest.mark.parametrize("item", cells.CHECKS)
def test_every_check_with_ranks_gives_figures(bench: Bench, item: str) -> None:
    figures = list(cells.CHECKS[item](bench, TINY))
    assert figures and all(figure.item == item for figure in figures)
    for figure in figures:
        assert figure.points and all(math.isfinite(point) for point in figure.points), figure
        json.dumps(figure.to_json(), allow_nan=False)
    assert len({figure.quantity for figure in figures}) == len(figures)


@pytest.mark.procs
@pytest.mark.parametrize("item", collectives.CHECKS)
def test_every_check_of_collectives_gives_figures(bench: Bench, item: str) -> None:
    effort = collectives.CollectiveEffort(
        repetitions={4096: 2, 1 << 20: 2}, preset="smoke", steps=3, warmup=1, updates=4
    )
    figures = list(collectives.CHECKS[item](bench, 2, effort))
    assert figures and all(figure.item == item for figure in figures)
    for figure in figures:
        assert figure.points or "no link is shaped here" in figure.note, figure
        assert all(math.isfinite(point) and point > 0 for point in figure.points), figure
    assert len({figure.quantity for figure in figures}) == len(figures)


@pytest.mark.procs
def test_every_parallelism_is_held_against_a_script_that_does_the_same_work(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "PRESET", "smoke")
    figures = list(parallel.parallel(bench, replace(TINY, launches=1)))
    assert len(figures) == 3 * sum(len(workloads) for _, _, workloads, _ in parallel.COMPARED)
    assert all(figure.item == "parallel" and figure.points for figure in figures)


@pytest.mark.procs
def test_every_compression_is_timed(bench: Bench) -> None:
    figures = list(compression.compression(bench, 2, {"digits": 3}))
    names = [name for name in plugins.names("compression") if name != "none"]
    said = {figure.quantity.partition(",")[0] for figure in figures}
    assert said == {"none", *names} and set(names) == set(codecs.OVER)
    assert len({figure.quantity for figure in figures}) == len(figures) == 4 * len(names) + 1
    for figure in figures:
        assert len(figure.points) == 2 and all(
            math.isfinite(point) and point > 0 for point in figure.points
        ), figure


def test_below_the_break_even_rate_the_bytes_cost_more_than_the_work() -> None:
    """100 MB saved, 8 s of work: 100 Mbit/s. Nothing is saved: on no link."""
    assert compression.break_even_mbit(150e6, 50e6, 8000.0) == 100.0
    assert compression.break_even_mbit(50e6, 60e6, 1.0) == 0.0


def test_what_a_topology_does_is_not_a_compressions_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves on only where it is told: 5 before, 1,000 in each of two calls, 7 between,
    3 after."""
    now = [0]
    monkeypatch.setattr(codecs.time, "perf_counter_ns", lambda: now[0])

    def spend(ns: int) -> None:
        now[0] += ns

    class Twice:
        def mean(self, flat: torch.Tensor, topology: codecs.Nowhere) -> None:
            spend(5)
            topology.mean(flat)
            spend(7)
            topology.mean(flat)
            spend(3)

    monkeypatch.setattr(
        codecs.Nowhere, "mean", lambda self, flat: (self._leave(), spend(1000), self._return())
    )
    assert codecs._timed(Twice(), torch.zeros(1)) == (12, 3)  # type: ignore[arg-type]


@pytest.mark.procs
def test_a_worker_made_slow_by_a_straggler_is_seen(bench: Bench) -> None:
    """The whole way through real launches: eight times the compute time is not lost in noise."""
    cell = resolve(
        Cell(workload="cnn", preset="digits", budget=Budget(steps=8), straggler={"0": 8.0})
    )
    effort = replace(TINY, launches=2, pairs=1, warmup=3)
    ratio, *_ = cells.against_script(bench, cell, "flat_loop", effort, name="slowed")
    assert replace(ratio, foreign=0.0).verdict == "miss", ratio


@pytest.mark.procs
def test_the_page_is_not_run_without_stored_runs(tmp_path: Path) -> None:
    (figure,) = files.page(tmp_path / "nothing")
    assert figure.verdict == "not run" and "benchsuite run quick" in figure.note


@pytest.mark.procs
def test_commands_and_store_give_figures() -> None:
    figures = [*files.commands(2), *files.store(20)]
    assert [len(figure.points) for figure in figures] == [2, 2, 1, 3]


def test_every_simulation_gives_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process and small; the fresh processes are the next test's."""
    monkeypatch.setattr(simulations, "WORKERS", 4)
    monkeypatch.setattr(simulations, "BIG_WORLD", 6)
    monkeypatch.setattr(simulations, "STEPS", dict.fromkeys(simulations.STEPS, 3))
    asked: list[tuple[str, int, int]] = []

    def launch(
        name: str, launches: int, repetitions: int
    ) -> tuple[list[dict[str, float]], float | None]:
        asked.append((name, launches, repetitions))
        return [simulations.CHECKS[name](1)] * launches, 0.0

    monkeypatch.setattr(virtual, "_launch", launch)
    figures = list(virtual.virtual(2))
    assert [name for name, *_ in asked] == list(simulations.CHECKS)
    assert {figure.item for figure in figures} == {"virtual"}
    for figure in figures:
        assert len(figure.points) == 2 and min(figure.points) > 0, figure
        assert figure.verdict in ("pass", "miss"), figure
    assert len({figure.quantity for figure in figures}) == len(figures) == 9


def test_gradients_that_do_not_go_together_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulations, "WORKERS", 3)
    monkeypatch.setattr(simulations, "STEPS", {"mlp": 2})
    monkeypatch.setattr("benchsuite.virtual.gradients.CLOSE", dict.fromkeys(CLOSE, -1.0))
    with pytest.raises(RuntimeError, match="not computed together"):
        simulations.mlp(1)


@pytest.mark.procs
def test_a_simulation_runs_in_a_fresh_process_and_a_failing_one_says_which() -> None:
    points, _ = virtual._launch("ring", 1, 1)
    assert set(points[0]) == {"free", "1 Gbit/s"} and min(points[0].values()) > 0
    with pytest.raises(
        UsageError, match=r"selfcheck virtual: rings ended with 1: KeyError: 'rings'"
    ):
        virtual._launch("rings", 1, 1)
