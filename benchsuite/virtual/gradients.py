"""Gradients of many workers at once: `vmap(grad)` of the workload's loss.

It is traced once per size of a group, and replayed. This is exact: a worker's row depends on its
own parameters and its own batch only. Groups are padded to the next of `SIZES`, at most `MOST_ROWS`
per call (1024 rows in one call took twice the memory of 64). Workers that hold the same parameters
(a synchronous step) share them in one big batch.

What cannot be batched (a loss that looks at values, a module with running statistics or dropout) is
computed one by one; `reason` says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from benchsuite.parallel.data import DataPart
from benchsuite.plan import hashing, plugins
from benchsuite.plan.cell import Cell, identity
from benchsuite.virtual.graphs import CountCalls, Graph, trace
from benchsuite.virtual.states import ModuleStates
from benchsuite.workload import Batch, Workload

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MOST_ROWS = SIZES[-1]
# Of gradients, parameters and both in pieces, in one call.
MOST_BYTES = 256 * 2**20
COPIES = 4  # of a row: parameters, gradient, and both in pieces
# A call from a graph costs more Python than one from the module's own C++ backward pass.
CHEAPER_ALONE = 0.5
# How close a batched gradient is to one computed alone, relative to its norm.
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-9}

Graphs = dict[tuple[Any, ...], Graph]  # of one workload, by the shapes of a group


def loss_key(cell: Cell) -> str:
    """A text that is equal for cells whose workload is the same function of parameters and
    batch.
    """
    workload = identity(cell)["workload"]
    options = cell.options.get(plugins.stem(cell.workload))

    return hashing.canonical([workload, options, cell.precision])


class Gradients:
    """Computes groups of gradients of one workload.

    template: a replica that computes gradients one by one. seed: of the cell. traced: graphs of the
    same workload under other seeds, to be used and added to; each is held against the module before
    this object uses it for the first time.
    """

    def __init__(
        self,
        workload: Workload,
        template: DataPart,
        *,
        seed: int,
        traced: Graphs | None = None,
        batching: bool = True,
    ) -> None:
        self._workload = workload
        self._template = template
        self._traced = traced if traced is not None else {}
        self._checked: Graphs = {}
        # Below this number of rows, by the shapes of a batch, one by one is cheaper.
        self._alone: dict[tuple[Any, ...], float] = {}  # shapes of a batch -> its break-even
        self.reason = "" if batching else "switched off"  # why gradients are computed one by one
        row_bytes = COPIES * template.params.numel() * template.params.element_size()

        self._most_rows = max(2, min(MOST_ROWS, MOST_BYTES // max(row_bytes, 1)))
        self.states = ModuleStates(template.module, seed)
        self._looked = False

    def compute(
        self, params: Tensor, rows: Sequence[int], batches: Sequence[Batch], grads: Tensor
    ) -> list[float]:
        """Fills grads[rows] with the gradients of these batches at params[rows]; returns the
        losses.

        params, grads: (ranks, P).
        """
        if not self._looked:
            self._look_for_states(params[rows[0]], batches[0])
        losses: list[float] = []
        for begin in range(0, len(rows), self._most_rows):
            end = begin + self._most_rows
            losses += self._group(params, rows[begin:end], batches[begin:end], grads)

        return losses

    def _group(
        self, params: Tensor, rows: Sequence[int], batches: Sequence[Batch], grads: Tensor
    ) -> list[float]:
        """One call's worth of rows: batched where that is possible and cheaper, else one by one."""
        if len(rows) > 1 and not self.reason and _alike(batches):
            x = torch.stack([batch.x for batch in batches])  # (rows, samples, ..)
            y = torch.stack([batch.y for batch in batches])  # (rows, samples, ..)
            losses = self._batched(params, rows, x, y, batches[0].num_samples, grads)
            if losses is not None:
                return losses

        return [
            self._one_of(row, params, batch, grads)
            for row, batch in zip(rows, batches, strict=True)
        ]

    def _look_for_states(self, params: Tensor, batch: Batch) -> None:
        """Finds out, once, whether ranks must keep buffers and random numbers apart."""
        self._looked = True
        self.states.look(lambda: self._one(params, batch, torch.empty_like(params)))

        if self.states.changing:
            self.reason = (
                self.reason
                or "its module draws random numbers or keeps running values, every rank its own"
            )

    def _one_of(self, rank: int, params: Tensor, batch: Batch, grads: Tensor) -> float:
        """A gradient of one rank alone, with the buffers and random numbers of that rank."""
        with self.states.of(rank):
            return self._one(params[rank], batch, grads[rank])

    def _one(self, params: Tensor, batch: Batch, grad: Tensor) -> float:
        """A gradient by the module's own backward pass, through the template."""
        template = self._template
        # The template is one replica for all ranks: it works with the parameters that it is given.
        template.params.copy_(params)
        with torch.enable_grad():
            loss = template.gradient(batch)
        assert loss is not None
        # (P,)
        grad.copy_(template.grad)
        return loss

    # -- batched -----------------------------------------------------------------------------------

    def _batched(
        self,
        params: Tensor,
        rows: Sequence[int],
        x: Tensor,
        y: Tensor,
        num_samples: int,
        grads: Tensor,
    ) -> list[float] | None:
        """Fills these rows and returns their losses; None where one by one is right, or cheaper.

        x, y: (rows, ..).
        """
        if len(rows) <= self._break_even(x, y, num_samples) or self.reason:
            return None

        size = next(size for size in SIZES if size >= len(rows))
        if size > len(rows):
            # The group is filled up with its first row, whose gradient goes to the same place.
            pad = torch.zeros(size - len(rows), dtype=torch.long)
            x = torch.cat([x, x[pad]])
            y = torch.cat([y, y[pad]])

        index = torch.tensor([*rows, *[rows[0]] * (size - len(rows))])  # (size,)
        first = params[rows[0]]
        # Most groups differ in their last rows, and the first difference ends the comparison.
        shared = all(torch.equal(params[row], first) for row in reversed(rows))
        held = first if shared else params.index_select(0, index)  # (P,) or (size, P)
        graph = self._graph(held, x, y, num_samples)
        if graph is None:
            return None

        with torch.no_grad():
            values: list[float] = graph.run(held, x, y, grads, index).tolist()
        return values[: len(rows)]

    def _break_even(self, x: Tensor, y: Tensor, num_samples: int) -> float:
        """Number of gradients that are as cheap one by one as together.

        It is found from numbers of calls, not by a clock, so that a run has the same bits
        everywhere. The digits CNN's batched gradient has 4.6 times the calls of its own: pairs go
        alone.
        """
        key = (x.shape[1:], x.dtype, y.shape[1:], y.dtype, num_samples)

        if key not in self._alone:
            twice = torch.zeros(2, dtype=torch.long)
            given = self._template.params.expand(2, -1).clone()  # (2, P)
            graph = self._graph(given, x[twice], y[twice], num_samples)

            with CountCalls() as alone:
                self._one(
                    self._template.params.clone(),
                    Batch(x[0], y[0], num_samples),
                    self._template.grad,
                )

            self._alone[key] = math.inf
            if graph is not None:
                self._alone[key] = CHEAPER_ALONE * graph.num_calls / alone.count

        return self._alone[key]

    def _graph(self, given: Tensor, x: Tensor, y: Tensor, num_samples: int) -> Graph | None:
        """The graph for these shapes, held against the module before its first use.

        given: (size, P), or (P,) where all rows share their parameters. None where there is no
        graph.
        """
        key = (len(x), given.dim(), x.shape[1:], x.dtype, y.shape[1:], y.dtype, num_samples)

        if key not in self._checked:
            if key not in self._traced and not self._trace(key, given, x, y, num_samples):
                return None
            if not self._agrees(self._traced[key], given, x, y, num_samples):
                return None

            self._checked[key] = self._traced[key]

        return self._checked[key]

    def _trace(
        self, key: tuple[Any, ...], given: Tensor, x: Tensor, y: Tensor, num_samples: int
    ) -> bool:
        """Makes a graph that can be replayed; False where the workload does what cannot be
        batched.
        """
        try:
            self._traced[key] = trace(self._loss_of(num_samples), given, x, y)
        except Exception as error:  # noqa: BLE001  whatever a workload does that vmap cannot: then one by one
            lines = str(error).strip().splitlines()
            self.reason = (
                f"its loss cannot be batched: {type(error).__name__}: {lines[0] if lines else ''}"
            )
            return False

        return True

    def _agrees(self, graph: Graph, given: Tensor, x: Tensor, y: Tensor, num_samples: int) -> bool:
        """Whether the last row of a group is what the module itself computes."""
        own = torch.empty_like(self._template.params)
        last = len(x) - 1
        gradients = own.new_zeros(len(x), own.numel())  # (size, P)
        with torch.no_grad():
            # Into rows of its own: the group's real rows are not touched yet.
            losses = graph.run(given, x, y, gradients, torch.arange(len(x)))
        params = given if given.dim() == 1 else given[last]  # (P,)
        loss = self._one(params, Batch(x[last], y[last], num_samples), own)

        close = CLOSE[own.dtype]
        gap = float(torch.linalg.vector_norm(gradients[last] - own))
        norm = float(torch.linalg.vector_norm(own))

        if gap > close * (1 + norm) or abs(float(losses[last]) - loss) > close * (1 + abs(loss)):
            self.reason = (
                "batched, its gradients are others than one by one: its loss depends on "
                "more than its batch"
            )
            return False

        return True

    def _loss_of(self, num_samples: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The loss of one row, as a function of its flat parameters (P,), x and y."""
        module = self._template.module
        workload = self._workload
        names = list(self._template.shapes)
        shapes = list(self._template.shapes.values())
        lengths = [shape.numel() for shape in shapes]

        def loss(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
            # Not slices: each slice's backward would fill a whole vector.
            pieces = flat.split(lengths)
            named = {
                name: piece.view(shape)
                for name, piece, shape in zip(names, pieces, shapes, strict=True)
            }
            return workload.loss(functional_call(module, named, (x,)), Batch(x, y, num_samples))

        return loss


def _alike(batches: Sequence[Batch]) -> bool:
    """Whether all batches are tensors of equal shapes."""
    first = batches[0]
    if not isinstance(first.x, Tensor) or not isinstance(first.y, Tensor):
        return False

    shape = (first.x.shape, first.y.shape, first.num_samples)
    return all((batch.x.shape, batch.y.shape, batch.num_samples) == shape for batch in batches)
