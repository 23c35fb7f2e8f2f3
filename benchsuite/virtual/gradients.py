"""Gradients of many workers at once: `vmap(grad)` of the workload's loss, traced once per group size and replayed.

Exact: a worker's row depends on its own parameters and its own batch only. Rows are padded to the next size that has
been traced, at most `MOST_ROWS` per call (1024 rows in one call took twice the memory of 64). Workers that hold the
same parameters (a synchronous step) share them in one big batch. What cannot be batched (a loss that looks at values,
a module with running statistics) is computed one by one; `reason` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from benchsuite import cell as cells
from benchsuite import plugins
from benchsuite.cell import Cell
from benchsuite.parallel.data import DataPart
from benchsuite.virtual.lean_graph import lean
from benchsuite.workload import Batch, Workload

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MOST_ROWS = SIZES[-1]
MOST_BYTES = 256 * 2**20  # of gradients, parameters and their parts in one call
COPIES = 4  # of a row: parameters, gradient, and both in pieces
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-9}  # batched against one by one, relative to the norm

Traced = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


Graphs = dict[tuple[Any, ...], Traced]  # of one workload, by the shapes of a group


def loss_key(cell: Cell) -> str:
    """Equal for cells whose workload is the same function of parameters and batch."""
    workload = cells.identity(cell)["workload"]
    return cells.canonical([workload, cell.options.get(plugins.stem(cell.workload)), cell.precision])


class Gradients:
    """Computes groups of gradients of one workload. `template`: a replica that is used one by one.

    traced: graphs of the same workload under other seeds, to be used and added to. Each is held against the module
    before this object uses it for the first time.
    """

    def __init__(
        self,
        workload: Workload,
        template: DataPart,
        *,
        traced: Graphs | None = None,
        batching: bool = True,
    ) -> None:
        self._workload, self._template = workload, template
        self._traced = traced if traced is not None else {}
        self._checked: Graphs = {}
        self.reason = "" if batching else "switched off"  # why gradients are computed one by one
        row_bytes = COPIES * template.params.numel() * template.params.element_size()
        self._most_rows = max(2, min(MOST_ROWS, MOST_BYTES // max(row_bytes, 1)))
        if batching and _is_random(template.module):
            self.reason = "dropout: every worker draws its own mask"

    def compute(self, params: Tensor, rows: Sequence[int], batches: Sequence[Batch], grads: Tensor) -> list[float]:
        """Fills grads[rows] with the gradients of these batches at params[rows]; returns the losses.

        params, grads: (ranks, P).
        """
        losses: list[float] = []
        for begin in range(0, len(rows), self._most_rows):
            end = begin + self._most_rows
            losses += self._group(params, rows[begin:end], batches[begin:end], grads)
        return losses

    def _group(self, params: Tensor, rows: Sequence[int], batches: Sequence[Batch], grads: Tensor) -> list[float]:
        if len(rows) > 1 and not self.reason and _alike(batches):
            index = torch.tensor(rows)
            held = params.index_select(0, index)  # (k, P)
            x, y = torch.stack([batch.x for batch in batches]), torch.stack([batch.y for batch in batches])
            found = self._batched(held, x, y, batches[0].num_samples)
            if found is not None:
                gradients, losses = found
                grads.index_copy_(0, index, gradients[: len(rows)])
                values: list[float] = losses[: len(rows)].tolist()
                return values
        return [self._one(params[row], batch, grads[row]) for row, batch in zip(rows, batches, strict=True)]

    def _one(self, params: Tensor, batch: Batch, grad: Tensor) -> float:
        template = self._template
        template.params.copy_(params)
        with torch.enable_grad():
            loss = template.gradient(batch)
        assert loss is not None
        grad.copy_(template.grad)
        return loss

    # -- batched -----------------------------------------------------------------------------------------------

    def _batched(self, held: Tensor, x: Tensor, y: Tensor, num_samples: int) -> tuple[Tensor, Tensor] | None:
        """(gradients (size, P), losses (size,)) of k <= size rows; None where they cannot be batched."""
        size = next(size for size in SIZES if size >= len(held))
        shared = all(torch.equal(row, held[0]) for row in reversed(held))  # a row that differs ends it at once
        if size > len(held):
            pad = torch.zeros(size - len(held), dtype=torch.long)
            x, y = torch.cat([x, x[pad]]), torch.cat([y, y[pad]])
            held = held if shared else torch.cat([held, held[pad]])
        given = held[0] if shared else held
        key = (size, shared, x.shape[1:], x.dtype, y.shape[1:], y.dtype, num_samples)
        traced = self._checked.get(key)
        if traced is None:
            if key not in self._traced and not self._trace(key, given, x, y, num_samples, shared=shared):
                return None
            traced = self._traced[key]
            if not self._agrees(traced, given, x, y, num_samples, shared=shared):
                return None
            self._checked[key] = traced
        with torch.no_grad():
            return traced(given, x, y)

    def _trace(
        self, key: tuple[Any, ...], given: Tensor, x: Tensor, y: Tensor, num_samples: int, *, shared: bool
    ) -> bool:
        """Makes a graph that can be replayed; False where the workload does what cannot be batched."""
        batched = vmap(grad_and_value(self._loss_of(num_samples)), in_dims=(None if shared else 0, 0, 0))
        try:
            self._traced[key] = lean(make_fx(lambda p, x, y: batched(p, x, y))(given, x, y)).forward
        except Exception as error:  # noqa: BLE001  whatever a workload does that vmap cannot: then one by one
            lines = str(error).strip().splitlines()
            self.reason = f"its loss cannot be batched: {type(error).__name__}: {lines[0] if lines else ''}"
            return False
        return True

    def _agrees(
        self, traced: Traced, given: Tensor, x: Tensor, y: Tensor, num_samples: int, *, shared: bool
    ) -> bool:
        """Whether the last row of a group is what the module itself computes."""
        with torch.no_grad():
            gradients, losses = traced(given, x, y)
        own, last = torch.empty_like(gradients[0]), len(x) - 1
        loss = self._one(given if shared else given[last], Batch(x[last], y[last], num_samples), own)
        close = CLOSE[own.dtype]
        gap = float(torch.linalg.vector_norm(gradients[last] - own))
        if gap > close * (1 + float(torch.linalg.vector_norm(own))) or abs(float(losses[last]) - loss) > close * (
            1 + abs(loss)
        ):
            self.reason = "batched, its gradients are others than one by one: its loss depends on more than its batch"
            return False
        return True

    def _loss_of(self, num_samples: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        module, workload = self._template.module, self._workload
        names, shapes = list(self._template.shapes), list(self._template.shapes.values())
        lengths = [shape.numel() for shape in shapes]

        def loss(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
            pieces = flat.split(lengths)  # not slices: each slice's backward would fill a whole vector
            named = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
            return workload.loss(functional_call(module, named, (x,)), Batch(x, y, num_samples))

        return loss


def _alike(batches: Sequence[Batch]) -> bool:
    """Tensors of equal shapes."""
    first = batches[0]
    if not isinstance(first.x, Tensor) or not isinstance(first.y, Tensor):
        return False
    shape = (first.x.shape, first.y.shape, first.num_samples)
    return all((batch.x.shape, batch.y.shape, batch.num_samples) == shape for batch in batches)


def _is_random(module: nn.Module) -> bool:
    """Whether a forward pass draws random numbers."""
    kinds = (nn.modules.dropout._DropoutNd,)
    return any(isinstance(part, kinds) and part.p > 0 for part in module.modules())
