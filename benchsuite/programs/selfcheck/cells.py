"""The checks of `benchsuite selfcheck` that start ranks: launching, harness, ring, server loop.

All cells run in one fork server, every launch is fresh, and whatever is compared takes turns. This
module imports no torch.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchsuite.cluster.rank_imports import RANK_ENTRY
from benchsuite.measure.load import CpuMeter
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.programs.bars import Figure
from benchsuite.programs.bench import Bench, Launch
from benchsuite.programs.selfcheck.collectives import medians, ratios

BASELINES = "benchsuite.programs.selfcheck.baseline_loops"
RANKS = "benchsuite.programs.selfcheck.ranks"
IDLE = Path(__file__).with_name("idle_strategy.py")
NEVER = 10**9  # samples between snapshots, more than any run has
MODULES = (BASELINES, RANKS)  # for the fork server to import
LAUNCH_BAR_S = 0.4
HARNESS_BAR = 0.97
RING_BARS = {4: 0.8, 16: 0.9, 64: 0.9}  # MiB -> bar
SERVER_BARS = {40_000: 0.5, 13_000_000: 0.9}  # bytes -> bar
MIB = 2**20


@dataclass(frozen=True)
class Effort:
    """How much is run; the tests run less."""

    launches: int = 5
    # Where step times are compared, each launch is so many pairs of short ones, so that what is
    # compared stands close in time.
    pairs: int = 3
    steps: int = 80  # of each short launch
    warmup: int = 10  # of these steps are not looked at
    idle_steps: int = 2000  # of the cell whose strategy does nothing
    ring_repetitions: Mapping[int, int] = field(
        default_factory=lambda: {4 * MIB: 100, 16 * MIB: 30, 64 * MIB: 8}
    )
    server_updates: Mapping[int, int] = field(
        default_factory=lambda: {40_000: 2000, 13_000_000: 60}
    )


# -- starting and ending a cell --------------------------------------------------------------------


def launching(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Times cells of two ranks that do nothing, and of two that train for five steps.

    The first cell of each kind is not counted.
    """
    cell = resolve(
        Cell(workload="cnn", preset="smoke", topology="ring", replicas=2, budget=Budget(steps=5))
    )
    bench.launch(cell, f"{RANKS}:empty")
    bench.launch(cell)
    meter = CpuMeter()
    empty = []
    real = []

    for _ in range(effort.launches):
        empty.append(bench.launch(cell, f"{RANKS}:empty"))
        real.append(bench.launch(cell))

    foreign = meter.read().foreign_share
    yield Figure(
        item="launch",
        quantity="first start: host, fork server, imports",
        unit="s",
        points=[bench.start_s],
    )
    yield Figure(
        item="launch",
        quantity="a later cell, 2 workers, doing nothing",
        unit="s",
        bar=LAUNCH_BAR_S,
        foreign=foreign,
        points=[(launch.end_ns - launch.begin_ns) / 1e9 for launch in empty],
    )
    yield Figure(
        item="launch",
        quantity="a later cell, 2 workers, CNN, less its loop",
        unit="s",
        bar=LAUNCH_BAR_S,
        foreign=foreign,
        points=[sum(phases(launch).values()) for launch in real],
        note=_phases_text(real),
    )


def phases(launch: Launch) -> dict[str, float]:
    """Where a cell's time goes outside its loop, in seconds.

    A phase ends when its last rank ends it.
    """
    marks = [
        dict(rank["marks_ns"], start=rank["start_ns"], end=rank["end_ns"]) for rank in launch.ranks
    ]
    last = {name: max(rank[name] for rank in marks) for name in marks[0]}
    edges = {
        "process": (launch.begin_ns, last["entered"]),
        "connect": (last["entered"], last["connected"]),
        "build": (last["connected"], last["built"]),
        "idle wire readings": (last["built"], last["start"]),
        "last wire reading": (last["end"], last["left_loop"]),
        "evaluate": (last["left_loop"], last["evaluated"]),
        "write, end": (last["evaluated"], launch.end_ns),
    }
    return {name: (end - begin) / 1e9 for name, (begin, end) in edges.items()}


def _phases_text(launches: Sequence[Launch]) -> str:
    each = [phases(launch) for launch in launches]
    medians = {name: 1e3 * statistics.median(phase[name] for phase in each) for name in each[0]}
    return "ms: " + ", ".join(f"{name} {value:.0f}" for name, value in medians.items())


# -- the harness -----------------------------------------------------------------------------------


def harness(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Compares the worker with hand-written loops of the same work.

    First comes its own book-keeping alone.
    """
    yield from bookkeeping(bench, effort)

    for sync, script, replicas in (
        ("synchronous", "flat_loop", 1),
        ("synchronous", "flat_loop", 2),
        ("ddp", "ddp_loop", 2),
    ):
        cell = resolve(
            Cell(
                workload="cnn",
                preset="digits",
                sync=sync,
                replicas=replicas,
                budget=Budget(steps=effort.steps),
            )
        )
        yield from against_script(bench, cell, script, effort, name=f"{script}, N={replicas}")


def bookkeeping(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """The time of the worker's loop around a strategy that does nothing, less that of the batch.

    What is left are heartbeats, clock, rows and snapshots.
    """
    idle = resolve(
        Cell(
            workload="cnn",
            preset="digits",
            sync=str(IDLE),
            options={"cnn": {"evaluate_every": NEVER}},
            budget=Budget(steps=effort.idle_steps),
        )
    )
    points = []

    for _ in range(effort.launches):
        steps = bench.launch(idle).ranks[0]["steps"]
        start, end, data = (
            np.array(steps[name], dtype=float) for name in ("start_ns", "end_ns", "data_ns")
        )
        points.append(float(np.median(end - start - data)) / 1e3)

    yield Figure(
        item="harness",
        quantity="book-keeping of a step that does nothing",
        unit="us",
        points=points,
    )


def against_script(
    bench: Bench,
    cell: Cell,
    script: str,
    effort: Effort,
    *,
    name: str,
    item: str = "harness",
    bar: float = HARNESS_BAR,
) -> Iterator[Figure]:
    """Launches the cell and the script in pairs, in the order ABBA from a random begin.

    `script` names a function of `baseline_loops`, or is an entry of its own.
    """
    sides: dict[str, list[float]] = {
        RANK_ENTRY: [],
        script if ":" in script else f"{BASELINES}:{script}": [],
    }
    cpu: dict[str, list[float]] = {entry: [] for entry in sides}
    order = list(sides)
    random.shuffle(order)
    meter = CpuMeter()

    for _ in range(effort.pairs * effort.launches):
        losses = []

        for entry in order:
            launch = bench.launch(cell, entry)
            sides[entry].append(step_us(launch.ranks, effort.warmup))
            cpu[entry].append(sum(rank["cpu_s"] for rank in launch.ranks))
            losses.append(launch.ranks[0]["steps"]["loss"][-1])

        order.reverse()

        if abs(losses[0] - losses[1]) > 1e-3 * abs(losses[1]):
            raise RuntimeError(
                f"{script} and the worker did not do the same work: last losses {losses}"
            )

    foreign = meter.read().foreign_share
    yield from _beside(sides, cpu, name=name, item=item, bar=bar, foreign=foreign)


def _beside(
    sides: Mapping[str, list[float]],
    cpu: Mapping[str, list[float]],
    *,
    name: str,
    item: str,
    bar: float,
    foreign: float | None,
) -> Iterator[Figure]:
    """The figures of pairs of launches: step times and CPU times of ours, and then of the script.

    `sides` holds microseconds of a median step, `cpu` seconds of the whole loop, one per launch.
    """
    ours, theirs = sides.values()
    our_cpu, their_cpu = cpu.values()
    yield Figure(
        item=item,
        quantity=f"{name}: its step time / ours",
        unit="",
        bar=bar,
        better="higher",
        points=ratios(theirs, ours),
        foreign=foreign,
        note=f"median step {statistics.median(theirs):.0f} us, ours "
        f"{statistics.median(ours):.0f} us",
    )
    yield Figure(
        item=item,
        quantity=f"{name}: its CPU time / ours, whole loop",
        unit="",
        better="higher",
        foreign=foreign,
        points=ratios(their_cpu, our_cpu),
    )
    yield Figure(
        item=item,
        quantity=f"{name}: added per step",
        unit="us",
        foreign=foreign,
        points=[a - b for a, b in zip(ours, theirs, strict=True)],
    )


def step_us(ranks: Sequence[Mapping[str, Any]], warmup: int) -> float:
    """The median step time of a launch in us; a step takes as long as its slowest rank."""
    start, end = (
        np.array([rank["steps"][name] for rank in ranks], dtype=float)
        for name in ("start_ns", "end_ns")
    )
    return float(np.median((end - start).max(axis=0)[warmup:])) / 1e3


# -- ring and server loop --------------------------------------------------------------------------


def ring(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Times the suite's ring and gloo's mean; both give the mean.

    Beside them stands gloo's bare sum, which training would still have to divide.
    """
    cell = resolve(Cell(workload="cnn", preset="smoke", topology="ring", replicas=2))
    foreign, launches = _launches(
        bench, cell, f"{RANKS}:ring", effort.launches, effort.ring_repetitions
    )

    for size in effort.ring_repetitions:
        time_of = {
            name: medians(launches, f"{name} {size}") for name in ("ring", "native", "all_reduce")
        }
        where = f"2 ranks, {size / MIB:g} MiB"

        for name, said in (
            ("all_reduce", "gloo's all_reduce (a sum)"),
            ("native", "gloo's all_reduce, divided"),
        ):
            yield Figure(
                item="ring",
                quantity=f"{where}: {said} / ring's mean",
                unit="",
                better="higher",
                foreign=foreign,
                bar=RING_BARS.get(size // MIB) if name == "all_reduce" else None,
                points=ratios(time_of[name], time_of["ring"]),
                note=f"ring {statistics.median(time_of['ring']) / 1e6:.2f} ms",
            )


def server(bench: Bench, effort: Effort) -> Iterator[Figure]:
    """Updates per second of the suite's server loop, against a loop that needs no tickets."""
    cell = resolve(
        Cell(
            workload="cnn",
            preset="smoke",
            sync="asynchronous",
            topology="parameter_server",
            replicas=1,
            servers=1,
        )
    )
    foreign, launches = _launches(
        bench, cell, f"{RANKS}:server", effort.launches, effort.server_updates
    )

    for size in effort.server_updates:
        tickets, ordered = (
            medians(launches, f"{name} {size}") for name in ("tickets", "known order")
        )
        yield Figure(
            item="server",
            quantity=f"1 worker, {size:,} bytes: updates per second",
            unit="/s",
            better="higher",
            foreign=foreign,
            points=[1e9 / ns for ns in tickets],
        )
        yield Figure(
            item="server",
            quantity=f"1 worker, {size:,} bytes: tickets / known order",
            unit="",
            better="higher",
            foreign=foreign,
            bar=SERVER_BARS.get(size),
            points=ratios(ordered, tickets),
        )


def _launches(
    bench: Bench, cell: Cell, entry: str, count: int, sizes: Mapping[int, int]
) -> tuple[float | None, list[Launch]]:
    """Returns (share of the cores that others used meanwhile, launches).

    The launches' seeds differ, and with them the order of what each measures.
    """
    meter = CpuMeter()
    launches = [bench.launch(cell.with_seed(seed), entry, sizes) for seed in range(count)]
    return meter.read().foreign_share, launches


CHECKS: Mapping[str, Callable[[Bench, Effort], Iterator[Figure]]] = {
    "launch": launching,
    "harness": harness,
    "ring": ring,
    "server": server,
}
