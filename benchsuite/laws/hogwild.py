"""Laws of hogwild: under the lock no increment is lost; without it none is made up, and the lost share is said.

How many are lost without a lock is a matter of luck: it is reported, and never asserted to be more than none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchsuite.cell import Cell
from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.runs import Change, GivenGradient, both, option, rebuilt, run, sync_of, with_options
from benchsuite.training import Training


def loses_nothing(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """Start 0, lr 1, every gradient 1: the shared vector ends at -U exactly, U = updates of all (U < 2^24)."""
    lost, updates = increments_lost(make_ranks, cell, change=change)
    return Figure(abs(lost), 0, f"{lost:g} increments of {updates} lost, {cell.label}")


def makes_nothing_up(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """The same without a lock: never beyond -U."""
    lost, updates = increments_lost(make_ranks, cell, change=change)
    text = f"{100 * lost / updates:.3g} % of {updates} increments lost without a lock, {cell.label}"
    return Figure(max(0.0, -lost), 0, text)


def increments_lost(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> tuple[float, int]:
    """(increments of an element that were lost, mean over the elements; updates made)."""
    cell = with_options(cell, "hogwild", lr_rule="same")
    result = run(make_ranks, cell, change=both(_ones, change))
    updates = sum(result.events["updates"])
    last = torch.stack([worker.params[-1] for worker in result.workers])
    return float((updates + last.min(dim=0).values).mean()), updates


def _ones(training: Training) -> Training:
    training.part.params.zero_()
    recipe = dataclasses.replace(
        training.recipe, make_optimizer=lambda params: torch.optim.SGD(params, lr=1.0), lr=lambda progress: 1.0,
        clip_norm=None,
    )  # fmt: skip
    return rebuilt(training, part=GivenGradient(training.part, _one), recipe=recipe)


def _one(grad: Tensor, step: int) -> None:
    grad.fill_(1.0)


class _Torn:
    """An updater that reads, takes a break, and writes what it then makes of it."""

    def __init__(self, shared: Tensor) -> None:
        self._shared = shared

    def step(self, grad: Tensor, *, samples: int) -> None:
        read = self._shared.clone()
        time.sleep(0.002)
        self._shared.copy_(read - grad)


class _Twice:
    """An updater that makes every step twice."""

    def __init__(self, updater: Any) -> None:
        self._updater = updater

    def step(self, grad: Tensor, *, samples: int) -> None:
        self._updater.step(grad, samples=samples)
        self._updater.step(grad, samples=samples)


def _twofold(training: Training) -> Training:
    strategy: Any = training.strategy
    strategy._updater = _Twice(strategy._updater)
    return training


def _unguarded(training: Training) -> Training:
    strategy: Any = training.strategy
    strategy._guard, strategy._updater = contextlib.nullcontext(), _Torn(strategy._shared)
    return training


_ON: Mapping[str, Any] = {
    "sync": "hogwild", "topology": "native", "replicas": 3, "options": {"hogwild": {"lock": "exclusive"}},
}  # fmt: skip

LAWS = (
    Law(
        "hogwild under its lock loses no increment",
        loses_nothing,
        lambda cell: sync_of(cell) == "hogwild" and option(cell, "hogwild", "lock") == "exclusive",
        (
            Control("the lock is not taken", partial(loses_nothing, change=_unguarded), _ON, real_ranks=True),
            Control("every step is made twice", partial(loses_nothing, change=_twofold), _ON),
        ),
        own_run=True,
    ),
    Law(
        "hogwild without a lock makes no increment up",
        makes_nothing_up,
        lambda cell: sync_of(cell) == "hogwild" and option(cell, "hogwild", "lock") == "none",
        (Control("every step is made twice", partial(makes_nothing_up, change=_twofold), _ON),),
        own_run=True,
    ),
)
