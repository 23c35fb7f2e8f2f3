"""Laws of gradient accumulation: m micro-batches, one after the other, are the whole batch.

The mean of equal pieces' mean gradients is the gradient of the mean loss. So training with them
equals one process on the whole batch under every form of the synchronous strategy, in buckets and
through the library too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases
from benchsuite.laws.harness.cases import Asked, tiny
from benchsuite.laws.harness.runs import rebuilt
from benchsuite.laws.harness.variants import RECIPES
from benchsuite.laws.synchronous import equals_one_process, is_exact
from benchsuite.plan.cell import Budget, Cell
from benchsuite.worker.setup import Training
from benchsuite.workload import Batch, Part, Ready, micro_batches

FORMS: tuple[dict[str, Any], ...] = (
    {"topology": "native"},
    {"topology": "ring", "options": {"synchronous": {"bucket_mib": 0.001}}},
    {"topology": "parameter_server"},
    {"sync": "ddp", "budget": Budget(timeout_s=60.0)},
)


def accumulated(cell: Cell) -> int:
    """The number of micro-batches that a share is cut into."""
    return int(cell.options.get("data", {}).get("num_micro_batches", 1))


def _cells(asked: Asked) -> Sequence[Cell]:
    """Two and four micro-batches at every number of workers; virtual time has no accumulation."""
    if asked.clock != "wall" or not asked.is_everything:
        return []
    return [
        tiny(
            RECIPES[2],
            replicas=workers,
            **{**form, "options": {**form.get("options", {}), "data": micro}},
        )
        for form in FORMS
        for workers in (1, 2, 3)
        for micro in ({"num_micro_batches": 2}, {"num_micro_batches": 4})
    ]


class _Summed:
    """A part that adds its micro-batches' gradients and never divides."""

    def __init__(self, part: Part, count: int) -> None:
        self._part = part
        self._count = count
        self.module = part.module
        self.shapes = part.shapes
        self.params = part.params

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def gradient(self, batch: Batch, ready: Ready | None = None, until: Any = None) -> float | None:
        loss = self._part.gradient(batch)
        self._part.grad.mul_(self._count)
        return loss


class _LastOnly(_Summed):
    """A part that keeps the gradient of the last micro-batch alone."""

    def gradient(self, batch: Batch, ready: Ready | None = None, until: Any = None) -> float | None:
        last = micro_batches(batch, self._count)[-1]
        x, y = (torch.cat([piece] * self._count) for piece in (last.x, last.y))
        return self._part.gradient(Batch(x, y, batch.num_samples))


def _with(broken: type[_Summed], training: Training) -> Training:
    """The change with a part of this kind."""
    part: Any = broken(training.part, accumulated(training.cell))
    return rebuilt(training, part=part)


def _broken(part: type[_Summed], make_ranks: MakeRanks, cell: Cell) -> Figure:
    """The law on ranks with such a part."""
    return equals_one_process(make_ranks, cell, change=partial(_with, part))


_ON = {"replicas": 2, "options": {"data": {"num_micro_batches": 4}}}
CELLS = cases.Cells(_cells, lambda cell: f"{cell.sync} in micro-batches")
LAWS = (
    Law(
        "m micro-batches equal the whole batch",
        equals_one_process,
        lambda cell: is_exact(cell) and accumulated(cell) > 1,
        (
            Control("their sum instead of their mean", partial(_broken, _Summed), _ON),
            Control("only the last one counts", partial(_broken, _LastOnly), _ON),
        ),
    ),
)
