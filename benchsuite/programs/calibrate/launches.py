"""The launches of `benchsuite calibrate`: what is measured how often, and the records put in order.

Every launch is fresh, and each round of launches takes every kind once, so that a slow spell of the
machine affects all kinds. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchsuite.analysis.fits import Points
from benchsuite.measure.load import CpuMeter
from benchsuite.plan.cell import Budget, Cell, global_batch
from benchsuite.programs.bench import Bench

MESSAGES = "benchsuite.programs.calibrate.ranks"
COMPUTE = "benchsuite.programs.calibrate.compute_ranks"
RANKS = (MESSAGES, COMPUTE)  # for the fork server to import
KIB = 2**10
MIB = 2**20
NS = 1e-9
SHARES = (1, 2, 4, 8)  # a gradient is timed on this part of the global batch
TIMEOUT_S = 120.0
LEAST_STEPS = 20

Record = Mapping[str, Any]


def _sizes() -> dict[int, int]:
    """Sizes of 1 KiB to 64 MiB by factors of 2, each with its repetitions.

    Each size moves about as many bytes in all, with 40 repetitions at most.
    """
    return {KIB << k: max(5, min(40, 64 * MIB // (KIB << k))) for k in range(17)}


def _rates() -> dict[int, dict[int, int]]:
    """Rate in Mbit/s -> bytes -> repetitions.

    What is timed is at least two bursts long; the slow links take long enough with few repetitions.
    """
    sizes = {256 * KIB: 3, MIB: 3}
    return {100: {256 * KIB: 2, MIB: 2}, 200: sizes, 400: sizes, 800: sizes, 1600: sizes}


@dataclass(frozen=True)
class Effort:
    """How much is run; the tests run less."""

    launches: int = 3
    sizes: Mapping[int, int] = field(default_factory=_sizes)
    controls: int = 200
    incast_sizes: Mapping[int, int] = field(default_factory=lambda: {MIB: 10, 8 * MIB: 5})
    # The size of the cell's own vector is added to these.
    add_sizes: Mapping[int, int] = field(default_factory=lambda: {MIB: 50, 16 * MIB: 10})
    gradients: int = 60  # per batch size and launch
    rounds: int = 120  # steps of two ranks with an exchange, and of one rank with an answer
    # Without rates no link is shaped.
    rates: Mapping[int, Mapping[int, int]] = field(default_factory=_rates)
    steps: int = 120  # of each cell that is predicted and measured
    # A large model makes fewer gradients, rounds and steps, so that each takes about so long.
    seconds: float = 3.0


@dataclass
class Launches:
    """All records, as kind -> launch -> record of each rank.

    Beside them stands the share of the cores that other processes used, by kind and launch.
    """

    batches: Sequence[int] = ()  # samples of one gradient, the global batch first
    records: dict[str, list[Sequence[Record]]] = field(default_factory=dict)
    foreign: dict[str, list[float | None]] = field(default_factory=dict)

    @property
    def vector_bytes(self) -> int:
        """The bytes of the workload's gradient."""
        return int(self.records["gradients"][0][0]["vector_bytes"])

    def foreign_share(self, kind: str) -> float | None:
        """The largest share of the cores that others used during a launch."""
        return max(
            (share for share in self.foreign.get(kind, []) if share is not None), default=None
        )

    def medians(self, kind: str, *path: str) -> list[float]:
        """The median time of each launch in seconds.

        Of several ranks that have such times the slowest counts, repetition by repetition.
        """
        return [float(np.median(slowest(ranks, *path))) * NS for ranks in self.records[kind]]

    def points(self, kind: str, name: str) -> list[Points]:
        """Per launch the pairs (bytes, median seconds), by size."""
        sizes = list(self.records[kind][0][0][name])
        columns = {float(size): self.medians(kind, name, size) for size in sizes}
        return [
            [(size, column[launch]) for size, column in columns.items()]
            for launch in range(self.num_launches)
        ]

    def affordable(self, most: int, seconds: float) -> int:
        """How many steps of a whole batch take about so long; at least 20."""
        step_s = self.medians("gradients", "step", str(self.batches[0]))[0]
        return max(LEAST_STEPS, min(most, int(seconds / step_s)))

    @property
    def two_ranks(self) -> bool:
        """Whether the batch could be halved, so that there are steps of two ranks."""
        return bool(self.records["steps"][0][0]["both_step"])

    @property
    def num_launches(self) -> int:
        """The number of rounds that were made."""
        return len(self.records["gradients"])

    @property
    def shaped_reason(self) -> str | None:
        """Why no link was shaped; None where links were shaped."""
        if "shaped" not in self.records:
            return "not asked for"
        return next(
            (ranks[0]["reason"] for ranks in self.records["shaped"] if ranks[0]["reason"]), None
        )

    def shaped_points(self) -> dict[float, Points]:
        """Rate in Mbit/s -> (bytes, median seconds) of all launches; empty without shaped links."""
        if self.shaped_reason is not None:
            return {}
        rates = self.records["shaped"][0][0]["one_way"]
        return {
            float(rate): [
                (float(size), median)
                for size in sizes
                for median in self.medians("shaped", "one_way", rate, size)
            ]
            for rate, sizes in rates.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Everything as it was measured, in ns."""
        return {"unit": "ns", "records": self.records, "foreign_cpu_share": self.foreign}


def slowest(ranks: Sequence[Record], *path: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The times at this path of the records, repetition by repetition of the slowest rank.

    Ranks that have no such times are left out.
    """
    rows = []

    for rank in ranks:
        found: Any = rank
        for name in path:
            found = found.get(name, {})
        if found:
            rows.append(found)

    return np.asarray(np.array(rows, dtype=float).max(axis=0))


def take(
    bench: Bench,
    cell: Cell,
    effort: Effort,
    *,
    say: Callable[[str], None],
    beside: Callable[[Launches], None],
) -> Launches:
    """Makes all rounds of launches.

    `beside` is called in each round with what was found so far, before the slow link, and measures
    what else belongs to it. `cell` is resolved and has one worker; the timed gradients are those of
    its workload and preset.
    """
    whole = global_batch(cell)
    found = Launches(batches=[whole // share for share in SHARES if whole % share == 0])

    for number in range(effort.launches):
        say(f"launches {number + 1} of {effort.launches}")
        seeded = cell.with_seed(number)
        batches = dict.fromkeys(found.batches, effort.gradients)
        _launch(bench, found, "gradients", seeded, {"batches": batches, "seconds": effort.seconds})
        size = found.vector_bytes
        own = {size // 2: 200, size: 200}
        _launch(bench, found, "additions", seeded, {"sizes": {**own, **effort.add_sizes}})
        _launch(
            bench, found, "messages", seeded, {"sizes": effort.sizes, "controls": effort.controls}
        )
        half = whole // 2 if whole % 2 == 0 else 0
        order = {
            "rounds": found.affordable(effort.rounds, effort.seconds),
            "both_batch": half,
            "both_bytes": size // 2,
        }
        _launch(bench, found, "steps", seeded, {**order, "one_batch": whole, "one_bytes": size})
        _launch(bench, found, "incast", seeded, {"sizes": effort.incast_sizes})
        beside(found)
        if effort.rates and found.shaped_reason in (None, "not asked for"):
            _launch(bench, found, "shaped", seeded, {"rates": effort.rates})

    return found


RANKS_OF = {"gradients": 1, "additions": 1, "messages": 2, "steps": 2, "incast": 3, "shaped": 2}


def _launch(bench: Bench, found: Launches, kind: str, cell: Cell, order: Mapping[str, Any]) -> None:
    replicas = RANKS_OF[kind]
    budget = Budget(samples=cell.budget.samples, timeout_s=TIMEOUT_S)
    started = dataclasses.replace(cell, replicas=replicas, topology="native", budget=budget)
    meter = CpuMeter()
    module = COMPUTE if kind in ("additions", "gradients", "steps") else MESSAGES
    launch = bench.launch(started, f"{module}:{kind}", order)
    found.foreign.setdefault(kind, []).append(meter.read().foreign_share)
    found.records.setdefault(kind, []).append(launch.ranks)
