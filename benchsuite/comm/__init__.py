"""`Comm`, the only door to other ranks. What went through it is `Traffic` (comm/traffic.py).

Strategies and topologies talk to this protocol only. `process.py` is torch.distributed under the
wall clock; the virtual clock has its own file with the same interface. Vectors are contiguous and
1-D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from benchsuite.comm.traffic import Edge, Traffic

if TYPE_CHECKING:  # who only counts bytes needs no torch
    import torch
    from torch import Tensor

__all__ = ["ABANDONED", "GOODBYE", "Comm", "Edge", "Handle", "Traffic"]

GOODBYE = -1  # ticket tag of a worker that sends no more pushes
ABANDONED = -2  # ticket tag of a worker that gave up a gradient: no push comes with it


class Handle(Protocol):
    """An operation under way."""

    def wait(self) -> Any:
        """Blocks until done; a lane's handle returns what its function returned, or raises what it
        raised."""


class Comm(Protocol):
    """The only door to other ranks. Ranks are local to this comm; `world_ranks` names them in the
    run."""

    rank: int
    size: int
    hosts: Sequence[int]  # host number of each rank
    world_ranks: Sequence[int]
    traffic: Traffic  # shared by all comms of this rank
    wait_ns: int  # time this rank was blocked in communication
    posts_ahead: (
        bool  # receives may be posted long before their sends (gloo); else in rounds (nccl)
    )
    # receives of up to so many bytes are faster when posted before their ticket; 0 = none are
    early_bytes: int

    def send(self, x: Tensor, dst: int) -> None:
        """Blocking."""

    def recv(self, x: Tensor, src: int) -> None:
        """Blocking; `x` has exactly the size of the message."""

    def sendrecv(self, x: Tensor, dst: int, y: Tensor, src: int) -> None:
        """Sends `x` and receives `y` at once: no deadlock in a ring."""

    def isend(self, x: Tensor, dst: int) -> Handle:
        """Zero-copy: `x` may not change before `wait`. Matched in posting order."""

    def irecv(self, x: Tensor, src: int) -> Handle:
        """Matched in posting order."""

    def all_reduce(self, x: Tensor) -> None:
        """Sum, in place, on every rank (the backend's own algorithm)."""

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """`out` is (size * x.numel(),)."""

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """`x` is (size * out.numel(),); `out` is this rank's slice of the sum."""

    def broadcast(self, x: Tensor, root: int) -> None:
        """In place from `root`."""

    def barrier(self) -> None:
        """All ranks arrive before one leaves."""

    def lane(self, fn: Callable[..., Any], *args: Any) -> Handle:
        """Calls `fn(lane_comm, *args)` on this rank's second lane, in calling order; lane_comm is
        its own group."""

    def split(self, ranks: Sequence[int]) -> Comm | None:
        """A comm of `ranks` (local ranks here); None for a rank outside. Every rank calls it, in
        the same order."""

    def now_ns(self) -> int:
        """This world's clock."""

    def fetch_add(self, name: str, n: int) -> int:
        """Adds `n` to a counter shared by the comm, returns its value before."""

    def ticket(self, dst: int, tag: int) -> None:
        """Tells rank `dst` that this rank's next message to it is ready; `tag` is free for the
        strategy (>= 0)."""

    def next_ticket(self) -> tuple[int, int, int]:
        """Waits for a ticket: (source, tag, sent_ns)."""

    def farewell(self, dst: int) -> None:
        """Sends one byte (control) that means nothing: what `dst` receives behind this rank's
        goodbye, or has open."""

    def shared(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """One zeroed vector in memory shared by all ranks of this comm (one host only)."""

    def lock(self, name: str) -> AbstractContextManager[Any]:
        """A lock shared by all ranks of this comm (one host only)."""
