"""What stands in the place of data, gradients and updates where no gradient is computed: times
only, or timed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchsuite.parallel.data import DataPart
from benchsuite.virtual.part import Request
from benchsuite.workload import Batch, Infer, Workload


class Losses:
    """In the place of a `Pool` where no gradient is computed: all ranks share one vector, and
    losses are given.

    losses: worker -> its losses step by step, of a run with the same trajectory; none = 0.
    """

    def __init__(self, template: DataPart, losses: Sequence[Sequence[float]] = ()) -> None:
        self.template = template
        self._losses = losses
        self.params = template.params.view(1, -1)
        self.grads = torch.zeros_like(template.params).view(1, -1)
        self._taken: dict[int, int] = {}
        self.num_gradients = self.num_groups = self.num_abandoned = 0

    def ask(self, row: int, batch: Batch) -> Request:
        """Nothing is computed."""
        request = Request(row, batch)
        step = self._taken.get(row, 0)
        self._taken[row] = step + 1
        request.loss = self._losses[row][step] if self._losses else 0.0
        return request

    def drop(self, request: Request) -> None:
        """Counts."""
        self.num_abandoned += 1

    def loss(self, request: Request) -> float:
        """As given."""
        assert request.loss is not None
        return request.loss

    def infer(self, row: int, x: Tensor) -> Tensor:
        """Of the parameters that all share."""
        return self.template.infer(x)


class WithoutData:
    """A workload whose batches hold nothing: where no gradient is computed nobody looks into
    them.
    """

    def __init__(self, workload: Workload, global_batch: int) -> None:
        self._workload = workload
        self._global_batch = global_batch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._workload, name)
        return {"environments": self._share, "collect": self._nothing}.get(name, found)

    def batch(self, index: int, *, shard: int, num_shards: int) -> Batch:
        return Batch(None, None, self._global_batch // num_shards)

    def _share(self, *, shard: int, num_shards: int) -> int:
        return self._global_batch // num_shards

    def _nothing(self, act: Infer, environments: int, number: int) -> NoRollout:
        """Nobody acts either."""
        return NoRollout(self._workload.per_rollout, environments)  # type: ignore[attr-defined]  # it collects


class NoRollout:
    """Minibatches that hold nothing; their sums travel all the same."""

    def __init__(self, count: int, num_samples: int) -> None:
        self._count = count
        self._num_samples = num_samples

    def statistics(self) -> Tensor:
        """Zeros."""
        return torch.zeros(self._count, 3, dtype=torch.float64)

    def batch(self, position: int, statistics: Tensor) -> Batch:
        """As many samples as one of its kind stands for."""
        return Batch(None, None, self._num_samples)


def idle(
    make: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
) -> Callable[[Any], torch.optim.Optimizer]:
    """The same optimiser, which steps nothing: where no gradient is computed there is nothing to
    step.
    """

    def made(params: Any) -> torch.optim.Optimizer:
        optimizer = make(params)
        optimizer.step = lambda: None  # type: ignore[assignment]
        return optimizer

    return made
