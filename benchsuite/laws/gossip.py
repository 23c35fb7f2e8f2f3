"""Laws of gossip: mixing keeps the sum, contracts disagreement as W says, and mixes parameters.

What is mixed are parameters and not gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.elastic_averaging import apart_without_gradients
from benchsuite.laws.harness.runs import (
    Change,
    Run,
    both,
    option,
    plain_sgd,
    rebuilt,
    run,
    sync_of,
)
from benchsuite.laws.harness.serial import mixing, seated
from benchsuite.laws.replicas import gradients_instead
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.worker.setup import Training

CONSERVED = 1e-12
CONTRACTS = 1e-4
STEPS = 30  # disagreement is still far above rounding, and only the slowest mode is left
STEPS_APART = 100  # a mode that grows by 1.1 per step has grown to 14,000 by then


def sum_is_conserved(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """Mixing alone keeps the sum over the replicas, with and without compression.

    Bound: a relative error of 1e-12. In the twin a replica keeps a hundredth too much.
    """
    result = run(make_ranks, cell, change=both(apart_without_gradients, change))
    start, end = (
        torch.stack([worker.params[k] for worker in result.workers]).sum(0) for k in (0, -1)
    )
    scale = sum(float(worker.params[0].norm()) for worker in result.workers)
    value = float((end - start).norm()) / scale
    return Figure(value, CONSERVED, f"||change of the sum|| / sum of ||x_i||, {cell.label}")


def contracts_by_modulus(
    make_ranks: MakeRanks,
    cell: Cell,
    *,
    change: Change | None = None,
    expected: Callable[[Cell], float] | None = None,
) -> Figure:
    """Each step shrinks disagreement by the second largest modulus of W's eigenvalues.

    W is constant and symmetric, and the learning rate is 0. Bound: a relative error of 1e-4. In the
    twin a replica keeps a hundredth too much.
    """
    cell = resolve(dataclasses.replace(cell, budget=Budget(steps=STEPS)))
    result = run(make_ranks, cell, change=both(_mode, change))
    before, after = (_disagreement(result, step) for step in (STEPS - 10, STEPS))
    modulus = second_modulus(cell)
    found = (after / before) ** 0.1 if before > 1e-13 else 0.0
    value = abs(found / modulus - 1) if modulus > 1e-12 else found
    return Figure(
        value,
        CONTRACTS,
        f"factor {found:.6f} per step, second largest modulus {modulus:.6f}, {cell.label}",
    )


def second_modulus(cell: Cell) -> float:
    """The second largest modulus of the eigenvalues of the graph's W in step 0."""
    matrix = mixing([seated(cell, rank) for rank in range(cell.num_workers)], 0)
    return float(torch.linalg.eigvalsh(matrix).abs().sort().values[-2])


def _mode(training: Training) -> Training:
    """The change in which replicas start along the slowest mode of W and nowhere else."""
    changed = apart_without_gradients(training)
    matrix = mixing([seated(training.cell, rank) for rank in range(training.comm.size)], 0)
    values, vectors = torch.linalg.eigh(matrix)
    slowest = int(values.abs().argsort()[-2])
    params = changed.part.params
    shape = torch.linspace(1.0, 2.0, params.numel(), dtype=params.dtype)
    params.copy_(shape * float(vectors[training.comm.rank, slowest]))
    return changed


def _disagreement(result: Run, step: int) -> float:
    """The distance of the replicas from their mean."""
    rows = torch.stack([worker.params[step] for worker in result.workers])
    return float((rows - rows.mean(0)).norm())


def stays_together(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """Replicas whose losses have different minima stay near the mean of these minima.

    Each replica's loss is a parabola around a point of its own. Bound: 1.5 for the farthest
    replica. The twin averages neighbours' gradients instead of parameters, which lets modes of W
    with a negative eigenvalue grow.
    """
    cell = resolve(dataclasses.replace(cell, budget=Budget(steps=STEPS_APART)))
    result = run(make_ranks, cell, change=both(_unequal, change))
    last = torch.stack([worker.params[-1] for worker in result.workers])
    farthest = float(last.norm(dim=1).max() / _point(0, last.shape[1], last.dtype).norm())
    text = (
        f"the farthest replica after {STEPS_APART} steps, in distances of a minimum, {cell.label}"
    )
    return Figure(farthest, 1.5, text)


def _point(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    """The minimum of a replica's loss; neighbours pull to opposite sides."""
    return torch.full((numel,), 1.0 if rank % 2 == 0 else -1.0, dtype=dtype)


class _Parabola:
    """A part whose gradient is x - point."""

    def __init__(self, part: Any, rank: int) -> None:
        self._part = part
        self._point = _point(rank, part.params.numel(), part.params.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def gradient(self, *args: Any) -> float:
        torch.sub(self._part.params, self._point, out=self._part.grad)
        return 0.0


def _unequal(training: Training) -> Training:
    """The change that gives every replica a loss of its own."""
    training.part.params.zero_()
    part = _Parabola(training.part, training.comm.rank)
    return rebuilt(training, part=part, recipe=plain_sgd(training.recipe, lr=0.3))


def _leaks(training: Training) -> Training:
    """The change in which a replica keeps a hundredth too much.

    The rows of W no longer sum to 1.
    """
    strategy: Any = training.strategy
    mix = strategy._mix

    def mixed(under_way: Any) -> None:
        before = training.part.params.clone()
        mix(under_way)
        training.part.params.add_(before, alpha=0.01)

    strategy._mix = mixed
    return training


def is_gossip(cell: Cell) -> bool:
    """Whether the laws of gossip speak about this cell."""
    return sync_of(cell) == "gossip" and cell.replicas > 1 and cell.precision == "fp64"


_ON: Mapping[str, Any] = {"sync": "gossip", "topology": "ring_neighbours", "replicas": 4}

LAWS = (
    Law(
        "mixing conserves the sum over replicas",
        sum_is_conserved,
        is_gossip,
        (
            Control(
                "a replica keeps a hundredth too much",
                partial(sum_is_conserved, change=_leaks),
                _ON,
            ),
        ),
    ),
    Law(
        "disagreement contracts by the second largest modulus of W",
        contracts_by_modulus,
        lambda cell: (
            is_gossip(cell) and cell.topology == "ring_neighbours" and cell.compression == "none"
        ),
        (
            Control(
                "a replica keeps a hundredth too much",
                partial(contracts_by_modulus, change=_leaks),
                _ON,
            ),
        ),
    ),
    Law(
        "replicas with unequal data stay together",
        stays_together,
        lambda cell: (
            is_gossip(cell)
            and cell.compression == "none"
            and option(cell, "gossip", "consensus_rate") == 1.0
        ),
        (
            Control(
                "neighbours' gradients are averaged, not parameters",
                partial(stays_together, change=gradients_instead),
                _ON,
            ),
        ),
    ),
)
