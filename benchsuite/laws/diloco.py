"""Laws of diloco's `outer_bits`: the outer gradient is as exact as its bits, and sends their bytes.

They are shown on everything that carries quantised vectors. Gradients are given, the outer learning
rate is 1 without momentum, and nothing is delayed: the way of the outer copy is then the mean of
what was decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchsuite import rules
from benchsuite.compression import pieces_of
from benchsuite.laws import Control, Figure, Law, MakeRanks, traffic
from benchsuite.laws.codecs import HALF_A_STEP, vector
from benchsuite.laws.harness.cases import Asked, Cells, subject_of, tiny
from benchsuite.laws.harness.runs import (
    Change,
    GivenGradient,
    Run,
    both,
    option,
    plain_sgd,
    rebuilt,
    run,
    with_options,
    worst,
)
from benchsuite.laws.harness.variants import APART_RECIPES, VARIANTS
from benchsuite.laws.topology import compare
from benchsuite.plan.cell import Cell, resolve
from benchsuite.topology import bounds
from benchsuite.worker.setup import Training

SAME = 1e-9  # numbers around 1 that are closer than this are one level
# Of a part of a tensor: the replicas' outer gradients, and the way of the outer copy.
Step = tuple[list[Tensor], Tensor]


def within_half_a_step(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """Each element of an outer step is that of the mean outer gradient, within half a step per hop.

    A step is range / (2^bits - 1) of the tensor, the mean of the replicas'. On `direct` the mean
    makes a second hop. The twin sends other bits than the option says.
    """
    steps = 2 ** int(option(cell, "diloco", "outer_bits")) - 1
    hops = 2 if cell.topology == "direct" else 1
    figures = []
    for where, (vectors, way) in _outer_steps(make_ranks, cell, change):
        ranges = [float(flat.max() - flat.min()) for flat in vectors]
        step = sum(ranges) / len(ranges) / steps or 1e-6 * float(torch.stack(vectors).abs().max())
        figures.append(
            (float((way - torch.stack(vectors).mean(0)).abs().max()) / step / hops, where)
        )
    value, where = worst(figures)
    # The second hop's range is that of a mean which is off by half a step at either end.
    bound = HALF_A_STEP + (hops - 1) * 2 / steps
    return Figure(value, bound, f"steps off per hop at most, {where}, {cell.label}")


def has_levels(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """Where one replica alone moves, a tensor of its outer gradient has 2^bits values at most.

    The twin sends other bits than the option says.
    """
    figures = []
    for where, (_, way) in _outer_steps(make_ranks, cell, both(_one_alone, change)):
        distinct = 1 + int((way.sort().values.diff() > SAME).sum())
        figures.append((float(distinct), f"{where}, {len(way)} elements"))
    value, where = worst(figures)
    bits = int(option(cell, "diloco", "outer_bits"))
    return Figure(value, 2**bits, f"values of a tensor at most, {where}, {cell.label}")


def sends_its_bits(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """Bytes and messages are those that the file predicts for so many bits.

    What the library sends is derived from its calls. Bound: exact. The twin sends other bits than
    the option says.
    """
    result = run(make_ranks, cell, change=change)
    return compare(result.traffic + result.called, traffic.predicted(result), result.cell)


def _outer_steps(
    make_ranks: MakeRanks, cell: Cell, change: Change | None
) -> Iterator[tuple[str, Step]]:
    """Every outer step of every part of a tensor that has a range of its own."""
    cell = resolve(with_options(cell, "diloco", outer_lr=1.0, outer_momentum=0.0, delay=0))
    result = run(make_ranks, cell, change=both(_with_given_gradients, change), after=_gradients)
    every, fragments = (int(option(cell, "diloco", name)) for name in ("local_steps", "fragments"))
    first = result.workers[0].params
    total = len(result.workers[0].params) - 1
    for number, (begin, end) in enumerate(bounds(first[0].numel(), fragments)):
        turn = (number + 1) * (every // fragments) % every
        due = [step for step in range(1, total + 1) if step % every == turn or step == total]
        for before, step in zip([0, *due], due, strict=False):
            ways = [torch.stack(worker.after[before:step]).sum(0) for worker in result.workers]
            for start, stop in _parts(result, begin, end):
                given = [way[start:stop] for way in ways], (first[before] - first[step])[start:stop]
                yield f"after step {step}, [{start}, {stop})", given


def _parts(result: Run, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The pieces of a fragment's tensors, cut where servers' slices or owners' chunks end."""
    owners = result.cell.num_servers or (
        result.cell.num_workers if result.cell.topology == "direct" else 1
    )
    for low, high in bounds(end - begin, owners):
        start = begin + low
        for size in pieces_of(result.workers[0].shapes, begin + low, begin + high):
            yield start, start + size
            start += size


class _Given(GivenGradient):
    """Gradients that are other numbers for every rank and step, and are remembered."""

    def __init__(self, part: Any, rank: int) -> None:
        super().__init__(part, self._next)
        self._rank = rank
        self.share = 1.0
        self.given = list[Tensor]()

    def _next(self, grad: Tensor, step: int) -> None:
        grad.copy_(vector(100 * step + self._rank, grad.numel(), grad.dtype) * self.share)
        self.given.append(grad.clone())


def _with_given_gradients(training: Training) -> Training:
    """The change that gives a rank such gradients."""
    part = _Given(training.part, training.comm.rank)
    return rebuilt(training, part=part, recipe=plain_sgd(training.recipe))


def _one_alone(training: Training) -> Training:
    """The change that leaves all replicas but the last where they are."""
    part: Any = training.part
    part.share = float(training.comm.rank == training.cell.num_workers - 1)
    return training


def _gradients(training: Training) -> list[Tensor]:
    """What the rank remembers of its gradients."""
    part: Any = training.part
    given: list[Tensor] = part.given
    return given


def _sends(bits: int) -> Change:
    """The change in which what travels has other bits than the option says."""

    def change(training: Training) -> Training:
        strategy: Any = training.strategy
        strategy.outer_bits = bits
        strategy.start(
            training.comm, training.part, training.recipe, training.topology, training.compression
        )
        return training

    return change


def _cells(asked: Asked) -> list[Cell]:
    """Every number of bits, on everything that carries quantised vectors."""
    if not asked.includes(sync="diloco", compression="none"):
        return []
    made = []
    for own in filter(lambda options: "outer_bits" in options, VARIANTS["diloco"]):
        for name in asked.members("topology"):
            for replicas in asked.workers:
                for servers in sorted({1, replicas}) if name == "parameter_server" else (0,):
                    fields = {
                        "sync": "diloco",
                        "topology": name,
                        "replicas": replicas,
                        "servers": servers,
                    }
                    made.append(
                        tiny(APART_RECIPES[2], options={"diloco": own}, clock=asked.clock, **fields)
                    )
    return [cell for cell in made if not rules.validate(cell)]


def _on(topology: str, bits: int, **fields: Any) -> Mapping[str, Any]:
    """Fields of a cell of diloco with so many outer bits."""
    options = {"diloco": {"local_steps": 5, "outer_bits": bits}}
    return {"sync": "diloco", "topology": topology, "replicas": 3, "options": options, **fields}


def _control(law: Any, bits: int, sent: int, topology: str, **fields: Any) -> Control:
    """A twin that sends `sent` bits where the option says `bits`."""
    broken = f"{bits} bits travel as {sent}, {topology}"
    return Control(broken, partial(law, change=_sends(sent)), _on(topology, bits, **fields))


def _controls(law: Any, bits: int, sent: int) -> tuple[Control, ...]:
    """One twin for each way in which quantised vectors travel."""
    ways: Mapping[str, Any] = {"native": {}, "direct": {}, "parameter_server": {"servers": 2}}
    return tuple(_control(law, bits, sent, topology, **fields) for topology, fields in ways.items())


CELLS = Cells(_cells, subject_of)
LAWS = (
    Law(
        "an outer gradient of few bits is off by half a step per hop at most",
        within_half_a_step,
        lambda cell: True,
        _controls(within_half_a_step, 8, 4),
        own_run=True,
    ),
    Law(
        "an outer gradient of 4 bits has 16 levels",
        has_levels,
        lambda cell: option(cell, "diloco", "outer_bits") == 4,
        _controls(has_levels, 4, 8),
        own_run=True,
    ),
    Law(
        "an outer gradient of few bits sends the bytes of so many",
        sends_its_bits,
        lambda cell: True,
        (
            _control(sends_its_bits, 4, 8, "native"),
            _control(sends_its_bits, 4, 8, "direct"),
            _control(sends_its_bits, 8, 4, "parameter_server", servers=2),
        ),
    ),
)
