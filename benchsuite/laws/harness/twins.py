"""Broken twins for negative controls: each wraps something that works and adds one defect.

The defects are those that codes of this field have had: no division by N, a synchronisation without
effect, an answer whose result is dropped, an addition in another order, a server that does not wait
for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchsuite.laws.harness.runs import Change, rebuilt
from benchsuite.sync import Apply, ServerPolicy
from benchsuite.topology import Topology
from benchsuite.topology.parameter_server import Topology as ParameterServer
from benchsuite.update import clip
from benchsuite.worker.setup import Training

Mean = Callable[[Topology, Tensor], None]


class OtherMean:
    """A topology whose mean is computed by another function, which may call the whole topology's
    own.
    """

    def __init__(self, whole: Topology, mean: Mean) -> None:
        self._whole = whole
        self._mean = mean

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def mean(self, flat: Tensor) -> None:
        self._mean(self._whole, flat)

    def second(self) -> OtherMean:
        """A second instance with the same defect, which a lane needs for a group of its own."""
        return OtherMean(self._whole.second(), self._mean)


def silent(whole: Topology, flat: Tensor) -> None:
    """Does not synchronise: every replica keeps its own vector."""


def sum_only(whole: Topology, flat: Tensor) -> None:
    """Forgets the division by N."""
    whole.mean(flat)
    flat.mul_(whole.num_workers)


def divided_first(whole: Topology, flat: Tensor) -> None:
    """Divides before it adds, as DistributedDataParallel does, which rounds differently."""
    flat.div_(whole.num_workers)
    whole.mean(flat)
    flat.mul_(whole.num_workers)


def detour(whole: Topology, flat: Tensor) -> None:
    """Makes one rounding more than needed."""
    whole.mean(flat)
    flat.mul_(1.1).div_(1.1)


def chunk_skipped(whole: Topology, flat: Tensor) -> None:
    """Leaves in one element what this rank had before."""
    mine = flat[-1:].clone()
    whole.mean(flat)
    flat[-1:] = mine


def rank_order(whole: Topology, flat: Tensor) -> None:
    """Computes the right mean in another order: it adds the vectors from rank 0 on."""
    comm = whole._comm  # type: ignore[attr-defined]
    rows = torch.empty(comm.size * flat.numel(), dtype=flat.dtype)
    comm.all_gather(rows, flat)
    flat.zero_()
    for row in rows.view(comm.size, -1):
        flat.add_(row)
    flat.div_(comm.size)


def twice(whole: Topology, flat: Tensor) -> None:
    """Synchronises twice where once is enough, which sends twice the bytes."""
    whole.mean(flat)
    whole.mean(flat)


def with_mean(mean: Mean) -> Change:
    """The change that lets the replicas use this mean."""
    return lambda training: rebuilt(training, topology=OtherMean(training.topology, mean))


class Deaf(ParameterServer):
    """A parameter server whose answer is dropped, so that the worker goes on with what it had."""

    def exchange(self, push: Tensor, pull: Tensor, *, tag: int) -> None:
        super().exchange(push, torch.empty_like(pull), tag=tag)


class Repeating(ParameterServer):
    """A parameter server to which everything is pushed twice."""

    def exchange(self, push: Tensor, pull: Tensor, *, tag: int) -> None:
        super().exchange(push, pull, tag=tag)
        super().exchange(push, pull, tag=tag)


def with_server(twin: Callable[[], ParameterServer], *, from_rank: int = 0) -> Change:
    """The change that gives the ranks from number `from_rank` on this parameter server."""

    def change(training: Training) -> Training:
        if training.comm.rank < from_rank:
            return training
        topology = twin()
        topology.start(training.comm, num_servers=training.cell.num_servers)
        return rebuilt(training, topology=topology)

    return change


class OtherPolicy:
    """A strategy whose servers follow another policy, made from the whole strategy's own."""

    def __init__(self, whole: Any, policy: Callable[[Any], Any]) -> None:
        self._whole = whole
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def policy(self) -> Any:
        self.made = self._policy(self._whole.policy())
        return self.made


class Policy(ServerPolicy):
    """A server policy that does as the whole one does; its twins override one method.

    It never passes an update on without `num_gradients`.
    """

    def __init__(self, whole: ServerPolicy) -> None:
        self._whole: Any = whole  # twins look at private parts of the policies that they know
        self.several_steps = whole.several_steps
        self.applies_later = whole.applies_later
        self.reads_ahead = whole.reads_ahead
        # Lists and counts that the whole policy fills while it runs.
        self.losses = whole.losses
        self.events = whole.events

    def start(self, shard: Tensor, apply: Apply) -> None:
        self._shard = shard
        self._apply = apply
        self._calls = 0
        self._whole.start(shard, self.apply)

    def apply(self, gradient: Tensor, *, num_gradients: int = 1, **where: Any) -> None:
        self._calls += 1
        self._apply(gradient, num_gradients=num_gradients, **where)

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        answers: list[int] = self._whole.on_push(worker, version, flat)
        return answers

    def on_goodbye(self, worker: int) -> list[int]:
        answers: list[int] = self._whole.on_goodbye(worker)
        return answers

    def answer(self, worker: int) -> Tensor:
        answer: Tensor = self._whole.answer(worker)
        return answer

    def snapshot(self) -> Tensor:
        snapshot: Tensor = self._whole.snapshot()
        return snapshot


class Undivided(Policy):
    """A server that forgets to divide by the number of gradients."""

    def apply(self, gradient: Tensor, *, num_gradients: int = 1, **where: Any) -> None:
        super().apply(gradient.mul_(num_gradients), num_gradients=num_gradients, **where)


class Forgetful(Policy):
    """A server that leaves out every fourth update."""

    def apply(self, gradient: Tensor, *, num_gradients: int = 1, **where: Any) -> None:
        self._calls += 1
        if self._calls % 4:
            self._apply(gradient, num_gradients=num_gradients, **where)


class Torn(Policy):
    """A server that answers half from the version before, as a reader without a lock may see it."""

    def start(self, shard: Tensor, apply: Apply) -> None:
        super().start(shard, apply)
        self._before = shard.clone()

    def apply(self, gradient: Tensor, *, num_gradients: int = 1, **where: Any) -> None:
        self._before.copy_(self._shard)
        super().apply(gradient, num_gradients=num_gradients, **where)

    def answer(self, worker: int) -> Tensor:
        half = len(self._shard) // 2
        return torch.cat([self._before[:half], self._shard[half:]])


class Early(Policy):
    """A server that applies the mean of N - 1 gradients before the last one is in, and drops that
    one.
    """

    def start(self, shard: Tensor, apply: Apply) -> None:
        super().start(shard, apply)
        self._sum = torch.zeros_like(shard)
        self._arrived = 0
        self._workers = self._whole._num_workers

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        self._arrived += 1
        if self._arrived < self._workers:
            self._sum.add_(flat)
        if self._arrived == self._workers - 1:
            self._apply(self._sum.div_(self._arrived), num_gradients=self._arrived)
            self._sum.zero_()
        if self._arrived < self._workers:
            return []
        self._arrived = 0
        return list(range(self._workers))


class Backwards(Policy):
    """A server that adds the gradients from the last rank down."""

    def start(self, shard: Tensor, apply: Apply) -> None:
        super().start(shard, apply)
        self._workers = self._whole._num_workers

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        return super().on_push(self._workers - 1 - worker, version, flat)


def with_policy(policy: Callable[[Any], Any], *, from_server: int = 0) -> Change:
    """The change that lets the servers from number `from_server` on follow this policy."""

    def change(training: Training) -> Training:
        if (
            not training.is_server
            or training.comm.rank - training.topology.num_workers < from_server
        ):
            return training
        training.strategy = OtherPolicy(training.strategy, policy)
        return training

    return change


class ClipsEach:
    """A part that clips its own replica's gradient, where the mean of all should be clipped."""

    def __init__(self, part: Any, clip_norm: float | None) -> None:
        self._part = part
        self._clip_norm = clip_norm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def gradient(self, *args: Any) -> Any:
        loss = self._part.gradient(*args)
        clip(self._part.grad, self._clip_norm)
        return loss


def clips_each(training: Training) -> Training:
    """The change that lets each replica clip its own gradient."""
    return rebuilt(training, part=ClipsEach(training.part, training.recipe.clip_norm))


class Late:
    """A part that hands over the gradient of the batch before."""

    def __init__(self, part: Any) -> None:
        self._part = part
        self._before = torch.zeros_like(part.grad)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def gradient(self, *args: Any) -> Any:
        loss = self._part.gradient(*args)
        newest = self._part.grad.clone()
        self._part.grad.copy_(self._before)
        self._before = newest
        return loss


def late_gradient(training: Training) -> Training:
    """The change that puts every worker one batch behind with its gradients."""
    return rebuilt(training, part=Late(training.part))


class Unwrapped:
    """A part that drops the wrapper which a strategy puts around its module."""

    def __init__(self, part: Any) -> None:
        part.wrap(lambda module: module)
        self._part = part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def wrap(self, wrapper: object) -> None:
        """Ignores the wrapper, so that the module stays as it is."""


def without_wrapper(training: Training) -> Training:
    """The change that hides the module from DistributedDataParallel, so that nothing is
    synchronised.
    """
    return rebuilt(training, part=Unwrapped(training.part))
