"""A process group whose backend moves the other memory than a vector is in: what travels is a copy.

gloo sends from host memory: a vector on a device goes through a pinned copy, and what comes in is
copied to the device when it has been waited for. nccl sends from the device: a scalar on the host
takes the other way. Bytes are counted the same. Copies count as waiting; what the device was given
before does not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class StagedWork:
    """An operation under way on copies, which are brought back once it is done. `copied_ns`: to
    make them."""

    def __init__(
        self,
        work: Any,
        wires: Sequence[Tensor],
        outs: Sequence[tuple[Tensor, Tensor]],
        copied_ns: int,
    ) -> None:
        # the wires must outlive the operation
        self._work = work
        self._wires = wires
        self._outs = outs
        self.copied_ns = copied_ns

    def wait(self) -> None:
        """Until it is done, and its results are where they were asked for."""
        self._work.wait()
        for wire, x in self._outs:
            x.copy_(wire)

        self._outs = ()


class StagedGroup:
    """A `torch.distributed.ProcessGroup` for vectors anywhere. `moved`: whose memory it moves."""

    def __init__(self, group: Any, moved: torch.device) -> None:
        self._group = group
        self._moved = moved
        self._copied_ns = 0  # of the operation that is being started

    def __getattr__(self, name: str) -> Any:
        """What takes no vector, by its own name; a collective of two vectors, (out, x)."""
        call = getattr(self._group, name)
        if name not in _OUT_AND_IN:
            return call

        def staged(out: Tensor, x: Tensor) -> StagedWork:
            wire = self._copied(x)
            into = self._room(out)

            return self._started(call(into, wire), [wire, into], [(into, out)])

        return staged

    def send(self, xs: list[Tensor], dst: int, tag: int) -> StagedWork:
        """Point to point."""
        wires = [self._copied(x) for x in xs]
        return self._started(self._group.send(wires, dst, tag), wires, [])

    def recv(self, xs: list[Tensor], src: int, tag: int) -> StagedWork:
        """Point to point."""
        wires = [self._room(x) for x in xs]
        return self._started(
            self._group.recv(wires, src, tag), wires, list(zip(wires, xs, strict=True))
        )

    def recv_anysource(self, xs: list[Tensor], tag: int) -> StagedWork:
        """From whoever sends first."""
        wires = [self._room(x) for x in xs]
        return self._started(
            self._group.recv_anysource(wires, tag), wires, list(zip(wires, xs, strict=True))
        )

    def allreduce(self, xs: list[Tensor]) -> StagedWork:
        """In place."""
        wires = [self._copied(x) for x in xs]
        return self._started(self._group.allreduce(wires), wires, list(zip(wires, xs, strict=True)))

    def broadcast(self, xs: list[Tensor], options: Any) -> StagedWork:
        """In place."""
        wires = [self._copied(x) for x in xs]
        return self._started(
            self._group.broadcast(wires, options), wires, list(zip(wires, xs, strict=True))
        )

    def _started(
        self, work: Any, wires: Sequence[Tensor], outs: Sequence[tuple[Tensor, Tensor]]
    ) -> StagedWork:
        copied_ns = self._copied_ns
        self._copied_ns = 0

        return StagedWork(work, wires, [(wire, x) for wire, x in outs if wire is not x], copied_ns)

    def _foreign(self, x: Tensor) -> bool:
        return x.device.type != self._moved.type

    def _room(self, x: Tensor) -> Tensor:
        """The vector, or one like it that the backend can write."""
        if not self._foreign(x):
            return x

        if self._moved.type == "cpu":
            return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)

        return torch.empty(x.shape, dtype=x.dtype, device=self._moved)

    def _copied(self, x: Tensor) -> Tensor:
        """The vector, or a copy that the backend can read, whole when this returns."""
        if not self._foreign(x):
            return x

        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()

        start = time.perf_counter_ns()
        wire = self._room(x)
        wire.copy_(x)
        self._copied_ns += time.perf_counter_ns() - start

        return wire


_OUT_AND_IN = (
    "all_gather_single",
    "reduce_scatter_single",
    "_allgather_base",
    "_reduce_scatter_base",
)
