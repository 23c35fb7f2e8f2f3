"""Cells whose step time is measured, and also predicted under the virtual clock from calibration.

The virtual world knows gradients, messages and what a receiver copies. All else that a step takes
is measured as a rest and added to its gradients: fetching the batch; the optimiser's step (a
server's too, since with one worker nobody else waits for it); a worker's counter and ticket; and
what a step of two ranks takes beyond its gradient and its messages.

That last rest is large where two ranks with two threads each share two cores: after computing,
gloo's thread waits for a core, up to one tick of the scheduler, whatever the message's size. The
workers of a step have it in common, so it is added as a median and not drawn for each. Each further
message that a rank's own thread starts in such a step waits too, though less: the messages of a
ring have that latency, the library's rounds inside one all-reduce do not.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchsuite import rules
from benchsuite.analysis.costs import MessageModel
from benchsuite.analysis.fits import Link
from benchsuite.plan import compute_time
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.programs.calibrate.launches import NS, TIMEOUT_S, Launches
from benchsuite.results.record import OVERSUBSCRIBED, Run, Status

GIB = 2**30
LEAST_MBIT = 1e-3
MOST_MBIT = 1e7


@dataclass(frozen=True)
class Models:
    """Fitted times of messages that travel alone, and of messages that ranks exchange at once."""

    one_way: MessageModel
    both_ways: MessageModel
    copy_s_per_gib: float  # the time to add in place what was received
    incast: float  # how much longer a message takes to enter a port that another one is entering


@dataclass
class Pair:
    """A cell and its virtual twin: the wall clock's runs, one per launch, and the virtual run."""

    cell: Cell
    twin: Cell | None = None
    reason: str = ""  # why there is no twin
    runs: list[Run] = field(default_factory=list)
    predicted: Run | None = None

    @property
    def measured_s(self) -> list[float]:
        """The median step time of each launch in wall seconds, without launches that failed."""
        return [run.cost["step_time_s_median"] for run in self.runs if run.status is Status.OK]

    @property
    def predicted_s(self) -> float | None:
        """The median step time in virtual seconds."""
        return self.predicted.cost.get("step_time_s_median") if self.predicted else None

    @property
    def difference(self) -> float | None:
        """The relative error: predicted / measured - 1.

        Measured is the median over launches. None where ranks share cores or where a time is
        missing.
        """
        flags = {flag for run in self.runs for flag in run.flags}
        if self.predicted_s is None or not self.measured_s or OVERSUBSCRIBED in flags:
            return None
        return self.predicted_s / statistics.median(self.measured_s) - 1

    def to_json(self) -> dict[str, Any]:
        """Both cells whole, both step times, and their relative difference."""
        return {
            "label": self.cell.label,
            "cell": self.cell.to_json(),
            "virtual_cell": self.twin.to_json() if self.twin else None,
            "reason": self.reason or None,
            "measured_step_s": self.measured_s,
            "measured_provenance": next(
                (run.cost.get("provenance") for run in self.runs if run.cost), None
            ),
            "measured_flags": sorted({flag for run in self.runs for flag in run.flags}),
            "measured_failures": [run.reason for run in self.runs if run.status is not Status.OK],
            "predicted_virtual_step_s": self.predicted_s,
            "predicted_provenance": "virtual",
            "predicted_failure": self.predicted.reason if self.predicted else None,
            "difference": self.difference,
        }


def pairs(workload: str, preset: str, steps: int) -> list[Pair]:
    """The cells to predict: one worker, two over a ring and over gloo, and one with a server."""
    base: dict[str, Any] = {
        "workload": workload,
        "preset": preset,
        "budget": Budget(steps=steps, timeout_s=TIMEOUT_S),
    }
    found = []
    kinds: Sequence[dict[str, Any]] = (
        {"replicas": 1, "topology": "native"},
        {"replicas": 2, "topology": "ring"},
        {"replicas": 2, "topology": "native"},
        {"replicas": 1, "servers": 1, "sync": "asynchronous", "topology": "parameter_server"},
    )

    for fields in kinds:
        cell = resolve(Cell(**base, **fields))
        found.append(
            Pair(cell, reason="; ".join(problem.reason for problem in rules.validate(cell)))
        )

    return found


def measure(pairs: Iterable[Pair], launch: Callable[[Cell], Run]) -> None:
    """Launches each cell once more under the wall clock."""
    for pair in pairs:
        if not pair.reason:
            pair.runs.append(launch(pair.cell))


def predict(
    pairs: Sequence[Pair],
    launches: Launches,
    models: Models,
    simulate: Callable[[Sequence[Cell]], Iterator[tuple[Cell, Run]]],
) -> None:
    """Makes the virtual twins and runs them; `simulate` yields (cell, run) as they end."""
    for pair in pairs:
        if not pair.reason:
            pair.twin = twin(pair.cell, launches, models)

    runs = {cell.id: run for cell, run in simulate([pair.twin for pair in pairs if pair.twin])}

    for pair in pairs:
        if pair.twin:
            pair.predicted = runs[pair.twin.id]


def twin(cell: Cell, launches: Launches, models: Models) -> Cell:
    """The same cell under the virtual clock.

    It has the measured times of gradients, links and receivers.
    """
    size = launches.vector_bytes
    link = models.one_way.fit.link(size)
    added = 0.0

    if cell.topology == "parameter_server":
        # A server steps where others add, and its times contain that.
        times = _answered(launches, models)
    elif cell.replicas == 1:
        times = _alone(launches)
    elif cell.topology == "ring":
        # Of a ring's receives every second one is added, and the others are copied.
        link = busy_link(launches, models)
        added = 0.5
        times = _exchanging(launches, link)
    else:
        link = models.both_ways.fit.link(size / 2)
        times = _exchanging(launches, link)

    return resolve(
        dataclasses.replace(
            cell,
            clock="virtual",
            compute_time=_resampled(times),
            link_mbit=min(max(link.mbit, LEAST_MBIT), MOST_MBIT),
            link_latency_us=link.alpha_s * 1e6,
            receive_cost={
                "copy_s_per_gib": added * models.copy_s_per_gib,
                "incast": max(1.0, models.incast),
            },
        )
    )


# -- seconds of a gradient and of all that a step takes besides ------------------------------------


def rests(launches: Launches, models: Models) -> Mapping[str, list[float]]:
    """What a step takes beyond its gradient and its messages, in seconds per launch.

    There is one rest for a step of one rank and two for a step of two ranks.
    """
    whole = str(launches.batches[0])
    found = {
        "alone": _differences(launches, "gradients", ("step", whole), ("gradient", whole), 0.0)
    }

    if launches.two_ranks:
        message = models.both_ways.fit.predict(launches.vector_bytes / 2)
        found["exchanging"] = _differences(
            launches, "steps", ("both_step",), ("both_gradient",), message
        )

    message = 2 * models.one_way.fit.predict(launches.vector_bytes)
    found["answered"] = _differences(launches, "steps", ("one_step",), ("one_gradient",), message)
    return found


def _differences(
    launches: Launches, kind: str, whole: Sequence[str], part: Sequence[str], known_s: float
) -> list[float]:
    """Median of the whole less the median of the gradient, less the messages alone.

    The medians are subtracted because the medians of a step's parts do not add up to that of the
    step.
    """
    pairs = zip(launches.medians(kind, *whole), launches.medians(kind, *part), strict=True)
    return [max(0.0, all_s - gradient_s - known_s) for all_s, gradient_s in pairs]


def _alone(launches: Launches) -> list[float]:
    whole = str(launches.batches[0])
    rest = statistics.median(
        _differences(launches, "gradients", ("step", whole), ("gradient", whole), 0.0)
    )
    return [value + rest for value in gradients_s(launches, "gradients", "gradient", whole)]


def second_message(launches: Launches) -> list[float]:
    """How many seconds one more message each way adds to a step of two ranks, per launch."""
    pairs = zip(
        launches.medians("steps", "twice_step"), launches.medians("steps", "both_step"), strict=True
    )
    return [twice - once for twice, once in pairs]


def busy_link(launches: Launches, models: Models) -> Link:
    """The link as messages each way find it where the ranks have just computed.

    It is never better than the link that messages find alone.
    """
    size = launches.vector_bytes / 2
    alone = models.both_ways.fit.link(size)
    waited = statistics.median(second_message(launches)) - alone.seconds(size)
    return Link(alone.alpha_s + max(0.0, waited), alone.beta_s_per_byte)


def _exchanging(launches: Launches, link: Link) -> list[float]:
    """The rest of a step that one message over such a link does not explain."""
    message = link.seconds(launches.vector_bytes / 2)
    rest = statistics.median(
        _differences(launches, "steps", ("both_step",), ("both_gradient",), message)
    )
    return [value + rest for value in gradients_s(launches, "steps", "both_gradient")]


def _answered(launches: Launches, models: Models) -> list[float]:
    rest = statistics.median(rests(launches, models)["answered"])
    counter, call, ticket = (
        statistics.median(launches.medians("messages", name))
        for name in ("counter", "ticket_call", "ticket")
    )
    # A push is received when its ticket is there. In virtual time a ticket takes the latency of a
    # message only, so what it takes longer is added.
    late = max(0.0, ticket - models.one_way.fit.predict(launches.vector_bytes))
    rest += counter + call + late
    return [value + rest for value in gradients_s(launches, "steps", "one_gradient")]


def gradients_s(launches: Launches, kind: str, *path: str) -> list[float]:
    """Seconds of each single gradient, of all ranks that computed, launch by launch."""
    found: list[float] = []

    for ranks in launches.records[kind]:
        for rank in ranks:
            times: Any = rank
            for name in path:
                times = times.get(name, {})
            found += [ns * NS for ns in times or ()]

    return found


def _resampled(seconds: Sequence[float]) -> dict[str, Any]:
    thin = seconds[:: max(1, -(-len(seconds) // compute_time.MOST_VALUES))]
    return {"kind": "resampled", compute_time.VALUES: " ".join(f"{value:.9f}" for value in thin)}


# -- models of messages and receivers --------------------------------------------------------------


def models_of(launches: Launches) -> Models:
    """The models fitted to what was measured."""
    one_way = MessageModel(launches.points("messages", "one_way"), launches.shaped_points())
    size = str(launches.vector_bytes)
    add_s = statistics.median(launches.medians("additions", "add", size))
    return Models(
        one_way=one_way,
        both_ways=MessageModel(launches.points("messages", "both_ways"), tried_with=one_way),
        copy_s_per_gib=add_s / launches.vector_bytes * GIB,
        incast=statistics.median(incast(launches)),
    )


def incast(launches: Launches) -> list[float]:
    """How much two messages that arrive at once disturb each other, per launch.

    At the largest size, two at once take (1 + incast) / 2 of the time that they take in turn.
    """
    size = list(launches.records["incast"][0][0]["at_once"])[-1]
    at_once, in_turn = (launches.medians("incast", name, size) for name in ("at_once", "in_turn"))
    return [2 * a / b - 1 for a, b in zip(at_once, in_turn, strict=True)]
