"""What stands in the place of data, gradients and updates where no gradient is computed.

A cell may be asked for times only, or a trajectory that is known is timed again.
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
    """Stands in the place of a `Pool` where no gradient is computed.

    All ranks share one vector. losses: worker -> its losses step by step, from a run with the same
    trajectory; () = every loss is 0.
    """

    def __init__(self, template: DataPart, losses: Sequence[Sequence[float]] = ()) -> None:
        self.template = template
        self._losses = losses
        self.params = template.params.view(1, -1)
        self.grads = torch.zeros_like(template.params).view(1, -1)
        self._taken: dict[int, int] = {}
        self.num_gradients = 0
        self.num_groups = 0
        self.num_abandoned = 0

    def ask(self, row: int, batch: Batch) -> Request:
        """Answers at once with the next known loss of the rank."""
        request = Request(row, batch)
        step = self._taken.get(row, 0)
        self._taken[row] = step + 1
        request.loss = self._losses[row][step] if self._losses else 0.0

        return request

    def drop(self, request: Request) -> None:
        """Counts a gradient that was given up."""
        self.num_abandoned += 1

    def loss(self, request: Request) -> float:
        """The known loss."""
        assert request.loss is not None
        return request.loss

    def infer(self, row: int, x: Tensor) -> Tensor:
        """The policy's answer by the parameters that all ranks share."""
        return self.template.infer(x)


class WithoutData:
    """A workload whose batches hold nothing.

    Where no gradient is computed nobody looks into them.
    """

    def __init__(self, workload: Workload, global_batch: int) -> None:
        self._workload = workload
        self._global_batch = global_batch

    def __getattr__(self, name: str) -> Any:
        """Everything else is the workload's own, but acting: environments are numbers of
        samples.
        """
        found = getattr(self._workload, name)
        if name == "environments":
            return self._share

        return self._nothing if name == "collect" else found

    def batch(self, index: int, *, shard: int, num_shards: int) -> Batch:
        return Batch(None, None, self._global_batch // num_shards)

    def _share(self, *, shard: int, num_shards: int) -> int:
        """In the place of a worker's environments: how many samples a minibatch of it stands
        for.
        """
        return self._global_batch // num_shards

    def _nothing(self, act: Infer, environments: int, number: int) -> NoRollout:
        """A rollout for which nobody acts."""
        return NoRollout(self._workload.per_rollout, environments)  # type: ignore[attr-defined]  # it collects


class NoRollout:
    """Minibatches that hold nothing; their sums travel all the same."""

    def __init__(self, count: int, num_samples: int) -> None:
        self._count = count
        self._num_samples = num_samples

    def statistics(self) -> Tensor:
        """Zeros, which take the place of the sums of advantages."""
        return torch.zeros(self._count, 3, dtype=torch.float64)

    def batch(self, position: int, statistics: Tensor) -> Batch:
        """A batch that holds nothing and counts as many samples as a real one."""
        return Batch(None, None, self._num_samples)


def idle(
    make: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
) -> Callable[[Any], torch.optim.Optimizer]:
    """The same optimiser, which steps nothing.

    Its state is asked for all the same: predictions count it.
    """

    def made(params: Any) -> torch.optim.Optimizer:
        optimizer = make(params)
        optimizer.step = lambda: None  # type: ignore[assignment]
        return optimizer

    return made
