"""Where a rank's time goes: `TimedPart` times its gradients, `StepClock` keeps a row per step.

`TimedPart` stands between strategy and part: it times the gradient, notices a loss that is not
finite, and makes a straggler slow. `StepClock` writes into arrays that exist before the loop, so
that the timed region does nothing else. Times are `perf_counter_ns`, which on one host is one clock
for all ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchsuite.comm import Handle
from benchsuite.measure.device_time import DeviceTimer, StepTimes
from benchsuite.plan.hashing import finite
from benchsuite.workload import Batch, DeviceLoss, Part, Ready, read_loss


class Diverged(Exception):
    """The parameters are not finite any more, so this rank stops computing.

    Raised before anything is sent, at the same step on every replica that agrees: nobody waits for
    a rank that has stopped.
    """


def check_finite(part: Part, loss: float) -> None:
    """Raises `Diverged` where the loss is not finite because the parameters are not.

    Parts of one replica are told the same loss, so all of them ask `finite` or none does.
    """
    if not math.isfinite(loss) and not part.finite():
        raise Diverged


CHECK_EVERY = 32  # gradients of a device between two looks at the loss, which wait for it


class TimedPart(Part):
    """A `Part` whose gradients are timed, and which may be made slow.

    slow_down: how many times as long as its own computation a gradient takes; above 1 the worker is
    a straggler. busy: whether it computes while it is slow, or sleeps.

    timer: of a device, whose times are known after the run only. `compute_ns` stays 0 until then,
    and a loss that is not finite is noticed at most 32 gradients later.
    """

    def __init__(
        self,
        part: Part,
        *,
        slow_down: float = 1.0,
        busy: bool = True,
        timer: DeviceTimer | None = None,
    ) -> None:
        self._part = part
        self._slow_down = slow_down
        self._busy = busy
        self._timer = timer

        self._num_gradients = 0  # on a device
        self._last_gradient_ns = 0  # when the first layer's gradient came, the last in backward
        self.module = part.module
        self.shapes = part.shapes
        self.params = part.params

        self.goes_on = False  # after a divergence: others wait for this rank
        self.compute_ns = 0
        self.backward_wait_ns = 0  # inside a library's backward pass, after the last gradient
        self.has_grad_buffer = part.has_grad_buffer

    @property
    def grad(self) -> Tensor:
        """The part's flat gradient."""
        return self._part.grad

    @grad.setter
    def grad(self, value: Tensor) -> None:
        self._part.grad = value

    def use_grad_buffer(self, buffer: Tensor) -> None:
        self._part.use_grad_buffer(buffer)

    def gradient_norm(self) -> float | None:
        return self._part.gradient_norm()

    def finite(self) -> bool:
        return self._part.finite()

    def infer(self, x: Tensor) -> Tensor:
        return self._part.infer(x)

    def gradient(
        self, batch: Batch, ready: Ready | None = None, until: Handle | None = None
    ) -> float | None:
        """The part's gradient, timed by the host's clock, or by events where the part is on a
        device.
        """
        if self._timer is not None:
            return self._on_device(self._timer, lambda: self._part.gradient(batch, ready, until))

        start = time.perf_counter_ns()
        loss = self._part.gradient(batch, ready, until)
        self._end(start, time.perf_counter_ns(), loss)
        return loss

    def _on_device(self, timer: DeviceTimer, compute: Callable[[], float | None]) -> float | None:
        """Computes a gradient between two events of the device.

        A straggler waits until its work is done, then for as long again as its factor says: this is
        the one case in which a step waits for the device.
        """
        slow = self._slow_down > 1.0
        start = timer.now_ns() if slow else 0
        timer.begin("compute")
        loss = compute()

        if slow:
            computed = timer.now_ns() - start
            self._wait_until(start + int(self._slow_down * computed))

        timer.end("compute")

        # Looking at a loss waits for the device, so it is done now and then only.
        self._num_gradients += 1
        if loss is not None and not self.goes_on and self._num_gradients % CHECK_EVERY == 0:
            check_finite(self._part, read_loss(loss))
        return loss

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> None:
        """Wraps the module, and marks when the first layer's gradient is there.

        The first layer is the last one in a backward pass: what the library does after it is
        waiting for communication that could not be hidden.
        """
        # A backward pass comes to the first layer last.
        first = next(p for p in self._part.module.parameters() if p.requires_grad)

        def mark(_: Tensor) -> None:
            self._last_gradient_ns = time.perf_counter_ns()

        first.register_post_accumulate_grad_hook(mark)
        self._part.wrap(wrapper)

    def backward(self, batch: Batch) -> float:
        """A backward pass through a library's wrapper: after the last gradient all is waiting."""
        if self._timer is not None:
            loss = self._on_device(self._timer, lambda: self._part.backward(batch))
            assert loss is not None
            return loss

        start = time.perf_counter_ns()
        loss = self._part.backward(batch)
        end = time.perf_counter_ns()
        # The mark is of an earlier pass where no hook has run in this one.
        last = self._last_gradient_ns if self._last_gradient_ns > start else end
        self.backward_wait_ns += end - last
        self._end(start, end, loss, waited=end - last)

        return loss

    def _end(self, start: int, end: int, loss: float | None, *, waited: int = 0) -> None:
        """Books a gradient: between start and end all but `waited` was computation.

        A straggler now takes longer by its factor, of what it computed and not of what it waited.
        """
        if loss is not None and not self.goes_on:
            check_finite(self._part, loss)
        # What was computed, without what was waited for inside the library.
        computed = end - start - waited

        if self._slow_down > 1.0:
            self._wait_until(end + int((self._slow_down - 1.0) * computed))
            computed += time.perf_counter_ns() - end

        self.compute_ns += computed

    def _wait_until(self, deadline: int) -> None:
        """Lets time pass: with a busy core, or asleep where ranks share cores."""
        if self._busy:
            while time.perf_counter_ns() < deadline:
                pass  # a slow worker computes: its core is not free for others
        else:
            time.sleep(max(0, deadline - time.perf_counter_ns()) / 1e9)


class StepClock:
    """One row per step of this rank: times in ns, the shard's number, samples, and the loss.

    A loss may still be on a device when its step is booked; `settle` reads all of these at once.
    """

    FIELDS = ("start_ns", "end_ns", "data_ns", "compute_ns", "blocked_ns", "index", "samples")

    def __init__(self, capacity: int) -> None:
        self._rows = np.zeros((max(capacity, 1), len(self.FIELDS)), dtype=np.int64)
        self._loss = np.full(max(capacity, 1), np.nan)
        self._abandoned: list[int] = []  # steps whose gradient was given up
        self._unread: list[tuple[int, DeviceLoss]] = []  # step, and its loss on the device
        self.num_steps = 0

    def add(self, row: tuple[int, int, int, int, int, int, int], loss: float | None) -> None:
        """Books one step; the arrays grow only where a strategy makes more steps than planned.

        row: as `FIELDS` says. loss: None where the gradient was given up.
        """
        position = self.num_steps

        if position == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
            self._loss = np.concatenate([self._loss, np.full_like(self._loss, np.nan)])

        # (steps, 7) of int64: no object is made inside the timed region.
        self._rows[position] = row

        if loss is None:
            self._abandoned.append(position)
        elif isinstance(loss, DeviceLoss):
            self._unread.append((position, loss))
        else:
            self._loss[position] = loss

        self.num_steps = position + 1

    def settle(self, times: Sequence[StepTimes]) -> None:
        """Reads what was left on a device, once, after the loop: losses, and the times of every
        step.

        A step begins when the one before ends. Data was fetched while the device worked: what of it
        can have made the device wait is at most what is left of the step.
        """
        # One transfer for all losses: each `float(loss)` would be a transfer of its own.
        if self._unread:
            values = torch.stack([loss.tensor.double() for _, loss in self._unread]).tolist()
            for (position, _), value in zip(self._unread, values, strict=True):
                self._loss[position] = value
            self._unread.clear()

        columns = {name: self._rows[:, at] for at, name in enumerate(self.FIELDS)}  # views

        for step, on_device in enumerate(times):
            if step:
                columns["start_ns"][step] = times[step - 1].end_ns
            columns["end_ns"][step] = max(on_device.end_ns, columns["start_ns"][step])
            columns["compute_ns"][step] = on_device.compute_ns
            # What the host waited for is there already: the device's waits come on top.
            columns["blocked_ns"][step] += on_device.blocked_ns

            whole = columns["end_ns"][step] - columns["start_ns"][step]
            left = whole - on_device.compute_ns - columns["blocked_ns"][step]
            columns["data_ns"][step] = max(0, min(columns["data_ns"][step], left))

    @property
    def num_samples(self) -> int:
        """Samples consumed so far."""
        return int(self._rows[: self.num_steps, self.FIELDS.index("samples")].sum())

    def to_json(self) -> dict[str, Any]:
        """Columns of plain numbers; a loss that is not finite is null."""
        columns: dict[str, Any] = {
            name: self._rows[: self.num_steps, position].tolist()
            for position, name in enumerate(self.FIELDS)
        }
        columns["loss"] = [finite(loss) for loss in self._loss[: self.num_steps].tolist()]
        # Their loss is null too, and is no divergence.
        columns["abandoned"] = self._abandoned

        return columns
