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

# Tags of tickets that announce no message. A strategy's own tags are 0 or more.
GOODBYE = -1  # of a worker that sends no more pushes
ABANDONED = -2  # of a worker that gave up a gradient: no push comes with it


class Handle(Protocol):
    """An operation under way, which has to be waited for once."""

    def wait(self) -> Any:
        """Blocks until done; a lane's handle returns what its function returned, or raises what it
        raised."""


class Comm(Protocol):
    """The only door to other ranks.

    Ranks are local to this comm, from 0 to size - 1; `world_ranks` names them in the run. All
    operations of a pair of ranks are matched in posting order.
    """

    rank: int
    size: int
    hosts: Sequence[int]  # host number of each rank
    world_ranks: Sequence[int]
    traffic: Traffic  # shared by all comms of this rank
    wait_ns: int  # time this rank was blocked in communication

    # receives may be posted long before their sends (gloo); else in rounds (nccl)
    posts_ahead: bool

    # receives of up to so many bytes are faster when posted before their ticket; 0 = none are
    early_bytes: int

    def send(self, x: Tensor, dst: int) -> None:
        """Sends a vector, and returns when its memory may be used again.

        That may be long before the peer has it, or not before the peer has asked for it: do not
        send to each other from both sides at once, but `sendrecv`.
        """

    def recv(self, x: Tensor, src: int) -> None:
        """Receives into `x`, which has exactly the size of the message, and returns when it is
        there."""

    def sendrecv(self, x: Tensor, dst: int, y: Tensor, src: int) -> None:
        """Sends `x` and receives `y` at once: no deadlock in a ring."""

    def isend(self, x: Tensor, dst: int) -> Handle:
        """Begins a send and returns at once.

        Nothing is copied: `x` may not change before `wait`. Matched in posting order.
        """

    def irecv(self, x: Tensor, src: int) -> Handle:
        """Begins a receive into `x` and returns at once; matched in posting order."""

    def all_reduce(self, x: Tensor) -> None:
        """Sum, in place, on every rank (the backend's own algorithm)."""

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """Every rank's `x`, in the order of ranks; `out` is (size * x.numel(),)."""

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """`x` is (size * out.numel(),); `out` is this rank's slice of the sum."""

    def broadcast(self, x: Tensor, root: int) -> None:
        """Copies the `x` of rank `root` into that of every rank."""

    def barrier(self) -> None:
        """Returns when all ranks have come here: all arrive before one leaves."""

    def lane(self, fn: Callable[..., Any], *args: Any) -> Handle:
        """Calls `fn(lane_comm, *args)` on this rank's second lane and returns at once.

        The lane is a thread that runs what it is handed in calling order; `lane_comm` joins the
        same ranks in a group of its own, so the two lanes cannot take each other's messages.
        """

    def split(self, ranks: Sequence[int]) -> Comm | None:
        """A comm of `ranks` (local ranks here); None for a rank outside.

        Every rank calls it, those outside too, in the same order.
        """

    def now_ns(self) -> int:
        """Nanoseconds on this world's clock, real or virtual; only differences mean anything."""

    def fetch_add(self, name: str, n: int) -> int:
        """Adds `n` to a counter shared by the comm, returns its value before.

        Counters begin at 0 and are told apart by their names. No two ranks get the same value.
        """

    def ticket(self, dst: int, tag: int) -> None:
        """Tells rank `dst` that this rank's next message to it is ready.

        A server that may hear from anybody waits for tickets, because NCCL has no receive from any
        source. `tag` is free for the strategy (>= 0).
        """

    def next_ticket(self) -> tuple[int, int, int]:
        """Waits for a ticket to this rank: (source, tag, sent_ns).

        Tickets come in the order in which they were sent, whoever sent them.
        """

    def farewell(self, dst: int) -> None:
        """Sends one byte (control) that means nothing.

        It ends a receive that `dst` has open, or posts behind this rank's goodbye.
        """

    def shared(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """One zeroed vector in memory shared by all ranks of this comm (one host only).

        Every rank calls it, in the same order.
        """

    def lock(self, name: str) -> AbstractContextManager[Any]:
        """A lock shared by all ranks of this comm (one host only)."""
