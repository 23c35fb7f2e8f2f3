"""The checks of `benchsuite selfcheck` on collectives: shared memory, buckets, a server's time.

All launches are fresh, and whatever is compared takes turns. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from benchsuite.cluster.rank_imports import RANK_ENTRY
from benchsuite.measure.load import CpuMeter
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.programs.bars import Figure
from benchsuite.programs.bench import Bench, Launch

Side = TypeVar("Side")
RANKS = "benchsuite.programs.selfcheck.ranks"
MIB = 2**20
HIERARCHICAL_BAR = 2.0
GOALS = {"copied": 3.0, "in place": 5.0}
OVERLAP_BAR = 1.10
OVERLAP_SHARED_BAR = 0.85
SHAPED = "benchsuite.programs.selfcheck.shaped"
# Both directions share the loopback, so each has about 3 Gbit/s, at which sending takes as long as
# computing.
SHAPED_MBIT = 6000
SHAPED_BUCKETS: Mapping[float, float | None] = {25.0: None, 10.0: 1.15}  # MiB -> bar
SERVER_SHARE_BAR = 0.95
# name -> sync, topology, bucket_mib, bar
SIDES: Mapping[str, tuple[str, str, float, float | None]] = {
    "DDP": ("ddp", "native", 0.0, None),
    "buckets, native": ("synchronous", "native", 25.0, OVERLAP_BAR),
    "buckets, ring": ("synchronous", "ring", 25.0, OVERLAP_BAR),
    "buckets, hierarchical": ("synchronous", "hierarchical", 25.0, OVERLAP_SHARED_BAR),
    "one vector, native": ("synchronous", "native", 0.0, None),
}


@dataclass(frozen=True)
class CollectiveEffort:
    """How much is run; the tests run less."""

    repetitions: Mapping[int, int] = field(
        default_factory=lambda: {MIB: 60, 4 * MIB: 30, 16 * MIB: 12, 64 * MIB: 5}
    )
    preset: str = "comm"  # which has the shapes of ResNet-18
    steps: int = 14  # of one training run
    warmup: int = 4
    updates: int = 60  # of a server with vectors of 13 MB


def hierarchical(bench: Bench, launches: int, effort: CollectiveEffort) -> Iterator[Figure]:
    """Compares the mean through shared memory with gloo's all_reduce, on 2 and 4 ranks.

    All ranks are on this host. gloo's all_reduce is a bare sum, which is not divided.
    """
    for ranks in (2, 4):
        cell = resolve(
            Cell(workload="cnn", preset="smoke", topology="hierarchical", replicas=ranks)
        )
        meter = CpuMeter()
        runs = [
            bench.launch(cell.with_seed(seed), f"{RANKS}:hierarchical", effort.repetitions)
            for seed in range(launches)
        ]
        foreign = meter.read().foreign_share

        for size in effort.repetitions:
            times = {
                name: medians(runs, f"{name} {size}")
                for name in ("all_reduce", "copied", "in place")
            }
            for name, goal in GOALS.items():
                points = ratios(times["all_reduce"], times[name])
                ours, theirs = (
                    statistics.median(times[side]) / 1e6 for side in (name, "all_reduce")
                )
                yield Figure(
                    item="hierarchical",
                    unit="",
                    better="higher",
                    bar=HIERARCHICAL_BAR,
                    points=points,
                    foreign=foreign,
                    quantity=f"{ranks} ranks, {size / MIB:g} MiB: gloo's all_reduce / "
                    f"hierarchical's mean, {name}",
                    note=f"{ours:.2f} ms, gloo {theirs:.2f} ms; best {max(points):.2f}, goal "
                    f"{goal:g}",
                )


def overlap(bench: Bench, launches: int, effort: CollectiveEffort) -> Iterator[Figure]:
    """Compares a step of two ranks with DistributedDataParallel's: ResNet-18, 4 images per rank."""
    cells = {name: _step_cell(*side[:3], effort=effort) for name, side in SIDES.items()}
    meter = CpuMeter()
    found = _in_turns(
        cells, launches, lambda cell: _step_ms(bench.launch(cell).ranks, effort.warmup)
    )
    foreign = meter.read().foreign_share

    for name, (_, _, _, bar) in SIDES.items():
        if name == "DDP":
            continue
        points = ratios(found[name], found["DDP"])
        yield Figure(
            item="overlap",
            quantity=f"ResNet-18 shapes, 2 ranks: step of {name} / DDP's",
            unit="",
            bar=bar,
            points=points,
            foreign=foreign,
            note=f"{statistics.median(found[name]):.1f} ms, DDP "
            f"{statistics.median(found['DDP']):.1f} ms; "
            f"best {min(points):.2f}",
        )

    yield from _hidden(bench, launches, effort)


def _hidden(bench: Bench, launches: int, effort: CollectiveEffort) -> Iterator[Figure]:
    """What buckets hide where sending is waiting and not work: on a shaped link.

    One whole vector is compared with buckets. DDP's default of 25 MiB is most of the 42.6 MiB of
    this model, so its first bucket leaves late; buckets of 10 MiB show what can be hidden.
    """
    figures = {
        mib: Figure(
            item="overlap",
            unit="",
            better="higher",
            bar=bar,
            quantity=f"the same, ring on a link of {SHAPED_MBIT} Mbit/s: step of one vector / of "
            f"{mib:g} MiB buckets",
        )
        for mib, bar in SHAPED_BUCKETS.items()
    }
    alone = resolve(Cell(workload="cnn", preset="smoke"))

    if why := bench.launch(alone, f"{SHAPED}:probe").ranks[0]["reason"]:
        yield from (
            dataclasses.replace(figure, note=f"no link is shaped here: {why}")
            for figure in figures.values()
        )
        return

    sides = {
        mib: _step_cell("synchronous", "ring", mib, effort=effort) for mib in (0.0, *SHAPED_BUCKETS)
    }
    shaped = {"entry": RANK_ENTRY, "mbit": SHAPED_MBIT}
    meter = CpuMeter()
    found = _in_turns(
        sides,
        launches,
        lambda cell: _step_ms(bench.launch(cell, f"{SHAPED}:around", shaped).ranks, effort.warmup),
    )
    foreign = meter.read().foreign_share
    plain = found[0.0]

    for mib, figure in figures.items():
        note = (
            f"{statistics.median(plain):.0f} ms, in buckets {statistics.median(found[mib]):.0f} ms"
        )
        yield dataclasses.replace(
            figure, points=ratios(plain, found[mib]), foreign=foreign, note=note
        )


def _in_turns(
    sides: Mapping[Side, Cell], launches: int, measure: Callable[[Cell], float]
) -> dict[Side, list[float]]:
    """So many values of each side; another side goes first in every round."""
    found: dict[Side, list[float]] = {side: [] for side in sides}
    order = list(sides)

    for _ in range(launches):
        for side in order:
            found[side].append(measure(sides[side]))
        order = order[1:] + order[:1]

    return found


def _step_cell(sync: str, topology: str, bucket_mib: float, *, effort: CollectiveEffort) -> Cell:
    options: dict[str, Any] = (
        {"synchronous": {"bucket_mib": bucket_mib}} if sync == "synchronous" else {}
    )
    return resolve(
        Cell(
            workload="cnn",
            preset=effort.preset,
            sync=sync,
            topology=topology,
            replicas=2,
            options=options,
            budget=Budget(steps=effort.steps),
        )
    )


def _step_ms(ranks: Sequence[Mapping[str, Any]], warmup: int) -> float:
    """The median step time of a launch in ms; a step takes as long as its slowest rank."""
    start, end = (
        np.array([rank["steps"][name] for rank in ranks], dtype=float)
        for name in ("start_ns", "end_ns")
    )
    return float(np.median((end - start).max(axis=0)[warmup:])) / 1e6


def server_profile(bench: Bench, launches: int, effort: CollectiveEffort) -> Iterator[Figure]:
    """Where a busy server's time goes with vectors of 13 MB: receiving, applying, sending.

    The rest is the suite's own loop.
    """
    cell = resolve(
        Cell(
            workload="cnn",
            preset="smoke",
            sync="asynchronous",
            topology="parameter_server",
            replicas=2,
            servers=1,
        )
    )
    meter = CpuMeter()
    runs = [
        bench.launch(cell, f"{RANKS}:server_profile", {13_000_000: effort.updates})
        for _ in range(launches)
    ]
    foreign = meter.read().foreign_share
    profiles = [run.ranks[-1] for run in runs]
    parts = ("receive", "apply", "send", "ticket")
    shares = {part: [profile[part] / profile["total"] for profile in profiles] for part in parts}
    yield Figure(
        item="profile",
        quantity="2 workers, 13 MB: receive + apply + send of the server's busy time",
        unit="",
        better="higher",
        bar=SERVER_SHARE_BAR,
        foreign=foreign,
        points=[
            (profile["receive"] + profile["apply"] + profile["send"])
            / (profile["total"] - profile["ticket"])
            for profile in profiles
        ],
        note=", ".join(
            f"{part} {100 * statistics.median(values):.0f} %" for part, values in shares.items()
        ),
    )


def medians(launches: Sequence[Launch], name: str) -> list[float]:
    """Per launch the median over repetitions of the slowest rank's time."""
    return [
        float(np.median(np.array([rank[name] for rank in launch.ranks]).max(axis=0)))
        for launch in launches
    ]


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """The quotient of two figures, launch by launch."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


CHECKS: Mapping[str, Callable[[Bench, int, CollectiveEffort], Iterator[Figure]]] = {
    "hierarchical": hierarchical,
    "overlap": overlap,
    "profile": server_profile,
}
