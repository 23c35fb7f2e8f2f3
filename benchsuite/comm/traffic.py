"""`Traffic`: bytes and messages by source and destination. Imports no torch."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Edge = tuple[int, int]  # (source rank, destination rank)
Call = tuple[
    str, int, int, tuple[int, ...]
]  # a library's collective: c10d name, numel, itemsize, world ranks
Calls = dict[Call, int]  # how often, noted by the first of its ranks

# Control bytes of one call, the same in both worlds.
TICKET_BYTES = 20  # source, tag, time sent
COUNTER_BYTES = 8

# A rank's lanes and a server's threads count into one `Traffic` at once. An addition reads and then
# writes, and Python may change threads between the two: without a lock bytes are lost. One lock for
# all of a process, because an object that holds its own can be neither copied nor pickled; it is
# held for some tenths of a microsecond, where the send that is counted takes tens of them.
_counting = threading.Lock()


def note(calls: Calls, call: Call) -> None:
    """Counts a call of the library once more; several threads may do so at once."""
    with _counting:
        calls[call] = calls.get(call, 0) + 1


@dataclass
class Traffic:
    """Bytes and messages by (source, destination), in world ranks.

    `payload_bytes`: vectors on a wire. `shm_bytes`: vectors through shared memory, which no wire
    sees. `control_bytes`: tickets, flags, shared counters (one number per source rank). A rank's
    own `Traffic` holds what it sent; `+` joins ranks, so the sum over ranks is the run's.

    Several threads may count into one (`add`, `add_shm`, `add_control`, `include`) while another
    copies it (`+`). Everything else reads one that is at rest.
    """

    payload: dict[Edge, int] = field(default_factory=dict)
    messages: dict[Edge, int] = field(default_factory=dict)
    shm: dict[Edge, int] = field(default_factory=dict)
    control: dict[int, int] = field(default_factory=dict)

    def add(self, source: int, destination: int, payload_bytes: int, messages: int = 1) -> None:
        """Counts a send of `payload_bytes` in `messages` messages."""
        edge = (source, destination)
        with _counting:
            self.payload[edge] = self.payload.get(edge, 0) + payload_bytes
            self.messages[edge] = self.messages.get(edge, 0) + messages

    def add_shm(self, source: int, destination: int, num_bytes: int) -> None:
        """Counts bytes handed over in shared memory."""
        edge = (source, destination)
        with _counting:
            self.shm[edge] = self.shm.get(edge, 0) + num_bytes

    def add_control(self, source: int, num_bytes: int) -> None:
        """Counts tickets, flags, counters."""
        with _counting:
            self.control[source] = self.control.get(source, 0) + num_bytes

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic.total((self, other))

    @staticmethod
    def total(each: Iterable[Traffic]) -> Traffic:
        """All of them together."""
        total = Traffic()
        for one in each:
            total.include(one)

        return total

    def include(self, more: Traffic) -> None:
        """Adds more to it, in place: others hold this one."""
        with _counting:
            for name in ("payload", "messages", "shm", "control"):
                sums = getattr(self, name)
                for key, count in getattr(more, name).items():
                    sums[key] = sums.get(key, 0) + count

    def minus(self, part: Traffic) -> Traffic:
        """Without a part of it. AssertionError where that is none."""
        rest = Traffic()
        for name in ("payload", "messages", "shm", "control"):
            counts = getattr(self, name)
            taken = getattr(part, name)
            left = {key: count - taken.get(key, 0) for key, count in counts.items()}
            assert set(taken) <= set(counts) and min(left.values(), default=0) >= 0, (
                f"{part} is no part of {self}"
            )

            getattr(rest, name).update({key: count for key, count in left.items() if count})

        return rest

    def moved(self, ranks: Sequence[int]) -> Traffic:
        """The same traffic where local rank i is world rank `ranks[i]`."""
        payload, messages, shm = (
            {(ranks[a], ranks[b]): count for (a, b), count in counts.items()}
            for counts in (self.payload, self.messages, self.shm)
        )

        return Traffic(
            payload, messages, shm, {ranks[rank]: count for rank, count in self.control.items()}
        )

    def times(self, factor: int) -> Traffic:
        """The same traffic `factor` times; nothing where factor is 0."""
        if factor == 0:
            return Traffic()

        payload, messages, shm = (
            {edge: count * factor for edge, count in counts.items()}
            for counts in (self.payload, self.messages, self.shm)
        )

        return Traffic(
            payload, messages, shm, {rank: count * factor for rank, count in self.control.items()}
        )

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
        return self.busiest_port()

    def busiest_port(self, ports: Sequence[int] = ()) -> int:
        """The same of one port; `ports`: of each rank, where some share one. What stays behind one
        is not counted."""
        sums: dict[tuple[str, int], int] = {}
        for (source, destination), count in self.payload.items():
            out, into = (ports[source], ports[destination]) if ports else (source, destination)
            if out != into:
                sums["out", out] = sums.get(("out", out), 0) + count
                sums["in", into] = sums.get(("in", into), 0) + count

        return max(sums.values(), default=0)

    def to_json(self) -> dict[str, Any]:
        """`{payload: [[source, destination, bytes]], messages: .., shm: .., control: [[source,
        bytes]]}`, sorted."""
        document: dict[str, Any] = {
            name: [[a, b, count] for (a, b), count in sorted(getattr(self, name).items())]
            for name in ("payload", "messages", "shm")
        }

        return document | {
            "control": [[rank, count] for rank, count in sorted(self.control.items())]
        }

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Traffic:
        """Inverse of `to_json`."""
        payload, messages, shm = (
            {(int(a), int(b)): int(count) for a, b, count in document[name]}
            for name in ("payload", "messages", "shm")
        )

        return Traffic(
            payload, messages, shm, {int(rank): int(count) for rank, count in document["control"]}
        )
