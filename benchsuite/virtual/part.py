"""Replicas of the virtual world: one module, and a row of parameters and gradients per rank.

A worker that asks for a gradient sleeps for its compute time. The gradient itself is computed when
the first sleeper wakes up, for all that have asked until then: their parameters and batches are
fixed already, so nothing changes but the number of calls. A gradient that is given up before
(`until`) is never computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchsuite.parallel.data import DataPart
from benchsuite.virtual.clock import Task, VirtualClock
from benchsuite.virtual.gradients import Gradients
from benchsuite.virtual.schedule import Schedule
from benchsuite.worker.clock import check_finite
from benchsuite.workload import Batch, Part, Ready

# A third of a gradient's time is its forward pass; the rest goes backward over the parameters.
FORWARD_SHARE = 3


class Times(Protocol):
    """How long gradients take, in virtual time."""

    def ns(self, worker: int, step: int) -> int:
        """Time of the worker's step-th gradient."""


class Awaited(Protocol):
    """A handle that can wake a sleeper: receives and lane calls of `VirtualComm`."""

    def ready(self) -> bool:
        """Whether it is done by now."""

    def wake_at_arrival(self, task: Task) -> None:
        """Wakes the task's next pause when it is done."""

    def forget(self) -> None:
        """Nobody waits for it any more."""


class Request:
    """A gradient that a worker has asked for; its loss is there once it is computed."""

    __slots__ = ("batch", "loss", "row")

    def __init__(self, row: int, batch: Batch) -> None:
        self.row = row
        self.batch = batch
        self.loss: float | None = None


class Pool:
    """Parameters and gradients of all ranks, (ranks, P) each.

    Computes all that has been asked for when the first of it is needed.
    """

    def __init__(self, template: DataPart, gradients: Gradients, *, num_ranks: int) -> None:
        self.template = template
        self._gradients = gradients
        self.params = template.params.expand(num_ranks, -1).clone()
        self.grads = torch.zeros_like(self.params)
        self._asked: dict[int, Request] = {}  # in the order of asking
        self.num_gradients = 0
        self.num_groups = 0
        self.num_abandoned = 0

    def ask(self, row: int, batch: Batch) -> Request:
        """Notes a request; the worker may not touch its parameters until it is done or dropped."""
        request = self._asked[row] = Request(row, batch)
        return request

    def drop(self, request: Request) -> None:
        """Forgets a request whose gradient nobody needs any more."""
        self._asked.pop(request.row, None)
        self.num_abandoned += 1

    def loss(self, request: Request) -> float:
        """The loss of a request; the gradient then stands in the worker's row."""
        if request.loss is None:
            self._compute_all()
        assert request.loss is not None
        return request.loss

    def infer(self, row: int, x: Tensor) -> Tensor:
        """Outputs of the rank's replica, as it is now."""
        # The one module that all ranks share works with this rank's parameters.
        self.template.params.copy_(self.params[row])
        with self._gradients.states.of(row):
            return self.template.infer(x)

    def _compute_all(self) -> None:
        """Computes every gradient that has been asked for, in groups."""
        # All that have asked are computed together: their parameters cannot change any more.
        requests = list(self._asked.values())
        self._asked.clear()
        rows = [request.row for request in requests]
        batches = [request.batch for request in requests]
        losses = self._gradients.compute(self.params, rows, batches, self.grads)
        for request, loss in zip(requests, losses, strict=True):
            request.loss = loss
        self.num_gradients += len(requests)
        self.num_groups += 1


class Source(Protocol):
    """Where a part's gradients come from: a `Pool`, or what stands in its place."""

    template: DataPart
    params: Tensor  # (ranks, P), or (1, P) where all ranks share a row
    grads: Tensor

    def ask(self, row: int, batch: Batch) -> Request:
        """Notes what the rank needs."""

    def drop(self, request: Request) -> None:
        """Forgets a request whose gradient nobody needs any more."""

    def loss(self, request: Request) -> float:
        """The loss of a request; the gradient then stands in the rank's row."""

    def infer(self, row: int, x: Tensor) -> Tensor:
        """Outputs of the rank's replica, as it is now."""


class VirtualPart(Part):
    """A `Part` in virtual time, timed like `worker.clock.TimedPart`."""

    def __init__(
        self,
        pool: Source,
        clock: VirtualClock,
        times: Times,
        *,
        rank: int,
        schedule: Schedule | None = None,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._times = times
        self._rank = rank
        self._schedule = schedule
        row = rank % len(pool.params)  # where nothing is computed all ranks share one row
        self.module: nn.Module = pool.template.module
        self.shapes = pool.template.shapes
        self.params = pool.params[row]
        self.grad = pool.grads[row]
        self._step = 0
        self.goes_on = False  # after a divergence: others wait for this rank
        self.compute_ns = 0
        self.backward_wait_ns = 0  # no library waits here

    def infer(self, x: Tensor) -> Tensor:
        return self._pool.infer(self._rank, x)

    def gradient(self, batch: Batch, ready: Ready | None = None, until: Any = None) -> float | None:
        """Asks for a gradient and lets its compute time pass; the sums are made when they are
        needed.

        until: where it is done first, the gradient is given up, and None is returned.
        """
        clock = self._clock
        begin = clock.now
        mark = begin  # until where a schedule has booked what was computed
        end = begin + self._times.ns(self._rank, self._step)
        self._step += 1
        request = self._pool.ask(self._rank, batch)
        if ready is not None:
            mark = self._announce(begin, end, request, ready)
        if until is None:
            if end > clock.now:
                clock.wait_until(end, "its gradient")
        elif not self._finished(end, until):
            self._pool.drop(request)
            self.compute_ns += clock.now - begin
            if self._schedule is not None:
                self._schedule.computed("gradient, given up", mark)
            return None

        if self._schedule is not None:
            self._schedule.computed("gradient", mark)
        loss = self._pool.loss(request)
        self.compute_ns += clock.now - begin
        if not self.goes_on:
            check_finite(self, loss)
        return loss

    def _finished(self, end: int, until: Awaited) -> bool:
        """Sleeps until the gradient is done (True) or, before that, the handle is (False)."""
        clock = self._clock
        task = self._clock.task

        while clock.now < end:
            if until.ready():
                until.forget()
                return False

            until.wake_at_arrival(task)
            # Whichever of the two comes first wakes it; the loop looks which one it was.
            clock.wake(task, end)
            clock.pause("its gradient")

        until.forget()
        return True

    def _announce(self, begin: int, end: int, request: Request, ready: Ready) -> int:
        """Hands on slices in backward order, each when its share of the backward pass is over.

        Shares are by numbers of elements. Returns when the last slice was handed on: a schedule has
        booked the gradient until then.
        """
        mark = begin
        total = self.params.numel()
        forward = (end - begin) // FORWARD_SHARE
        stop = total

        for shape in reversed(list(self.shapes.values())):
            start = stop - shape.numel()
            backward = (end - begin - forward) * (total - start) // total
            # After the forward pass, by the share of the elements that lie behind this slice.
            self._clock.wait_until(begin + forward + backward, "its gradient")
            self._pool.loss(request)
            if self._schedule is not None:
                self._schedule.computed("part of a gradient", mark)
            ready(start, stop)
            mark = self._clock.now
            stop = start

        return mark

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> None:
        raise ValueError("a library's wrapper runs by the wall clock: use clock = wall")

    def backward(self, batch: Batch) -> float:
        raise ValueError("a library's backward pass runs by the wall clock: use clock = wall")
