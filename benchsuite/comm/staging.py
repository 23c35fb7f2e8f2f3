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
    """An operation under way on copies, which are brought back once it is done.

    `outs` are pairs of a copy and the vector that it is brought back to. `copied_ns` is the time it
    took to make the copies.
    """

    def __init__(
        self,
        work: Any,
        wires: Sequence[Tensor],
        outs: Sequence[tuple[Tensor, Tensor]],
        copied_ns: int,
    ) -> None:
        # The wires are kept because they must outlive the operation: nobody else holds them, and
        # gloo would read memory that is somebody else's by then.
        self._work = work
        self._wires = wires
        self._outs = outs
        self.copied_ns = copied_ns

    def wait(self) -> None:
        """Blocks until it is done, and its results are where they were asked for."""
        self._work.wait()

        # Once only: a second `wait` finds nothing to bring back.
        for wire, x in self._outs:
            x.copy_(wire)

        self._outs = ()


class StagedGroup:
    """A `torch.distributed.ProcessGroup` for vectors in any memory.

    `moved` is the device whose memory the group inside moves. Vectors that are there already go
    through without a copy.
    """

    def __init__(self, group: Any, moved: torch.device) -> None:
        self._group = group
        self._moved = moved
        self._copied_ns = 0  # of the operation that is being started

    def __getattr__(self, name: str) -> Any:
        """Every other method of the group inside.

        One that takes no vector is handed out as it is. A collective of two vectors (out, x) is
        wrapped: these have other names in other versions of torch, so they are told by name.
        """
        call = getattr(self._group, name)
        if name not in _OUT_AND_IN:
            return call

        def staged(out: Tensor, x: Tensor) -> StagedWork:
            """Copies x out, runs the collective, and has its result copied back into out."""
            wire = self._copied(x)
            into = self._room(out)

            work = call(into, wire)
            return self._started(work, [wire, into], [(into, out)])

        return staged

    def send(self, xs: list[Tensor], dst: int, tag: int) -> StagedWork:
        """Sends to one rank; nothing is brought back.

        The copy is whole before the send begins, so the sender may change its vector at once.
        """
        wires = [self._copied(x) for x in xs]

        work = self._group.send(wires, dst, tag)
        return self._started(work, wires, [])

    def recv(self, xs: list[Tensor], src: int, tag: int) -> StagedWork:
        """Receives from one rank into memory that the backend can write.

        The vector itself gets its values in `wait`, on the thread that waits.
        """
        wires = [self._room(x) for x in xs]

        work = self._group.recv(wires, src, tag)
        return self._started(work, wires, list(zip(wires, xs, strict=True)))

    def recv_anysource(self, xs: list[Tensor], tag: int) -> StagedWork:
        """Receives from whoever sends first, otherwise like `recv`."""
        wires = [self._room(x) for x in xs]

        work = self._group.recv_anysource(wires, tag)
        return self._started(work, wires, list(zip(wires, xs, strict=True)))

    def allreduce(self, xs: list[Tensor]) -> StagedWork:
        """Sums the vectors over the ranks, in place."""
        wires = [self._copied(x) for x in xs]

        work = self._group.allreduce(wires)
        return self._started(work, wires, list(zip(wires, xs, strict=True)))

    def broadcast(self, xs: list[Tensor], options: Any) -> StagedWork:
        """Copies the vectors of the root, which `options` names, into those of every rank."""
        wires = [self._copied(x) for x in xs]

        work = self._group.broadcast(wires, options)
        return self._started(work, wires, list(zip(wires, xs, strict=True)))

    def _started(
        self, work: Any, wires: Sequence[Tensor], outs: Sequence[tuple[Tensor, Tensor]]
    ) -> StagedWork:
        """The operation that has begun, with the time that its copies took.

        A vector that was in the right memory is its own wire, and is not brought back.
        """
        copied_ns = self._copied_ns
        self._copied_ns = 0

        brought_back = [(wire, x) for wire, x in outs if wire is not x]
        return StagedWork(work, wires, brought_back, copied_ns)

    def _foreign(self, x: Tensor) -> bool:
        """Whether a vector is in a memory that the backend does not move."""
        return x.device.type != self._moved.type

    def _room(self, x: Tensor) -> Tensor:
        """The vector, or one like it that the backend can write."""
        if not self._foreign(x):
            return x

        # Host memory is pinned, or a copy to the device goes through one more copy.
        if self._moved.type == "cpu":
            return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)

        return torch.empty(x.shape, dtype=x.dtype, device=self._moved)

    def _copied(self, x: Tensor) -> Tensor:
        """The vector, or a copy that the backend can read, whole when this returns."""
        if not self._foreign(x):
            return x

        # The device may still be computing the vector. That time belongs to the computation, so the
        # clock of the copy starts after it.
        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()

        start = time.perf_counter_ns()
        wire = self._room(x)
        wire.copy_(x)
        self._copied_ns += time.perf_counter_ns() - start

        return wire


# The collectives of two vectors, by their names in the versions of torch that have them.
_OUT_AND_IN = (
    "all_gather_single",
    "reduce_scatter_single",
    "_allgather_base",
    "_reduce_scatter_base",
)
