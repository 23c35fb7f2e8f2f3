"""`Comm`, the only door to other ranks, and `Traffic`, what went through it.

Strategies and topologies talk to this protocol only. `process.py` is torch.distributed under the wall
clock; the virtual clock has its own file with the same interface. Vectors are contiguous and 1-D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

GOODBYE = -1  # ticket tag of a worker that sends no more pushes

Edge = tuple[int, int]  # (source rank, destination rank)


@dataclass
class Traffic:
    """Bytes and messages by (source, destination), in world ranks.

    `payload_bytes`: vectors on a wire. `shm_bytes`: vectors through shared memory, which no wire sees.
    `control_bytes`: tickets, flags, shared counters (one number per source rank). A rank's own `Traffic` holds what it
    sent; `+` joins ranks, so the sum over ranks is the run's.
    """

    payload: dict[Edge, int] = field(default_factory=dict)
    messages: dict[Edge, int] = field(default_factory=dict)
    shm: dict[Edge, int] = field(default_factory=dict)
    control: dict[int, int] = field(default_factory=dict)

    def add(self, source: int, destination: int, payload_bytes: int, messages: int = 1) -> None:
        """Counts a send of `payload_bytes` in `messages` messages."""
        edge = (source, destination)
        self.payload[edge] = self.payload.get(edge, 0) + payload_bytes
        self.messages[edge] = self.messages.get(edge, 0) + messages

    def add_shm(self, source: int, destination: int, num_bytes: int) -> None:
        """Counts bytes handed over in shared memory."""
        self.shm[source, destination] = self.shm.get((source, destination), 0) + num_bytes

    def add_control(self, source: int, num_bytes: int) -> None:
        """Counts tickets, flags, counters."""
        self.control[source] = self.control.get(source, 0) + num_bytes

    def __add__(self, other: Traffic) -> Traffic:
        total = Traffic()
        for name in ("payload", "messages", "shm", "control"):
            mine = dict(getattr(self, name))
            for key, count in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + count
            setattr(total, name, mine)
        return total

    def times(self, factor: int) -> Traffic:
        """The same traffic `factor` times; nothing where factor is 0."""
        if factor == 0:
            return Traffic()
        scale = lambda counts: {key: count * factor for key, count in counts.items()}  # noqa: E731
        return Traffic(scale(self.payload), scale(self.messages), scale(self.shm), scale(self.control))

    def mapped(self, ranks: Sequence[int]) -> Traffic:
        """Local ranks 0..n-1 renamed to `ranks`."""
        edges = lambda counts: {(ranks[a], ranks[b]): count for (a, b), count in counts.items()}  # noqa: E731
        return Traffic(
            edges(self.payload), edges(self.messages), edges(self.shm),
            {ranks[a]: count for a, count in self.control.items()},
        )  # fmt: skip

    @property
    def payload_bytes(self) -> int:
        """Sum over all edges."""
        return sum(self.payload.values())

    @property
    def shm_bytes(self) -> int:
        """Sum over all edges."""
        return sum(self.shm.values())

    @property
    def control_bytes(self) -> int:
        """Sum over all ranks."""
        return sum(self.control.values())

    @property
    def num_messages(self) -> int:
        """Sum over all edges."""
        return sum(self.messages.values())

    @property
    def busiest_port_bytes(self) -> int:
        """The most payload that one rank sends, or receives (ports are full duplex)."""
        ports: dict[tuple[str, int], int] = {}
        for (source, destination), count in self.payload.items():
            ports["out", source] = ports.get(("out", source), 0) + count
            ports["in", destination] = ports.get(("in", destination), 0) + count
        return max(ports.values(), default=0)

    def to_json(self) -> dict[str, Any]:
        """`{payload: [[source, destination, bytes]], messages: .., shm: .., control: [[source, bytes]]}`, sorted."""
        rows = lambda counts: [[a, b, count] for (a, b), count in sorted(counts.items())]  # noqa: E731
        return {
            "payload": rows(self.payload),
            "messages": rows(self.messages),
            "shm": rows(self.shm),
            "control": [[rank, count] for rank, count in sorted(self.control.items())],
        }

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Traffic:
        """Inverse of `to_json`."""
        edges = lambda rows: {(int(a), int(b)): int(count) for a, b, count in rows}  # noqa: E731
        return Traffic(
            edges(document["payload"]), edges(document["messages"]), edges(document["shm"]),
            {int(rank): int(count) for rank, count in document["control"]},
        )  # fmt: skip


class Handle(Protocol):
    """An operation under way."""

    def wait(self) -> Any:
        """Blocks until done; a lane's handle returns what its function returned, or raises what it raised."""


class Comm(Protocol):
    """The only door to other ranks. Ranks are local to this comm; `world_ranks` names them in the run."""

    rank: int
    size: int
    hosts: Sequence[int]  # host number of each rank
    world_ranks: Sequence[int]
    traffic: Traffic  # shared by all comms of this rank
    wait_ns: int  # time this rank was blocked in communication
    posts_ahead: bool  # receives may be posted long before their sends (gloo); else in rounds (nccl)

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
        """Calls `fn(lane_comm, *args)` on this rank's second lane, in calling order; lane_comm is its own group."""

    def split(self, ranks: Sequence[int]) -> Comm | None:
        """A comm of `ranks` (local ranks here); None for a rank outside. Every rank calls it, in the same order."""

    def now_ns(self) -> int:
        """This world's clock."""

    def fetch_add(self, name: str, n: int) -> int:
        """Adds `n` to a counter shared by the comm, returns its value before."""

    def ticket(self, dst: int, tag: int) -> None:
        """Tells rank `dst` that this rank's next message to it is ready; `tag` is free for the strategy (>= 0)."""

    def next_ticket(self) -> tuple[int, int, int]:
        """Waits for a ticket: (source, tag, sent_ns)."""

    def shared(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """One zeroed vector in memory shared by all ranks of this comm (one host only)."""

    def lock(self, name: str) -> AbstractContextManager[Any]:
        """A lock shared by all ranks of this comm (one host only)."""
