"""`Traffic`: bytes and messages by source and destination. Imports no torch."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# (source rank, destination rank)
Edge = tuple[int, int]

# A library's collective: its name in c10d, elements, bytes of an element, world ranks.
Call = tuple[str, int, int, tuple[int, ...]]

# How often each was called, as the first of its ranks notes it.
Calls = dict[Call, int]

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
        """Counts bytes handed over in shared memory, which are no message."""
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
        """The traffic of all of them together, in an object of its own.

        The sum over the ranks of a run is the traffic of the run.
        """
        total = Traffic()
        for one in each:
            total.include(one)

        return total

    def include(self, more: Traffic) -> None:
        """Adds more to this one in place, for others hold it.

        A copy (`+`) that another thread makes meanwhile has all of `more`, or nothing of it: the
        lock is held for all four tables.
        """
        with _counting:
            for name in ("payload", "messages", "shm", "control"):
                sums = getattr(self, name)
                for key, count in getattr(more, name).items():
                    sums[key] = sums.get(key, 0) + count

    def minus(self, part: Traffic) -> Traffic:
        """What is left of this traffic without a part of it.

        AssertionError where the other one is no part of it, because it has more bytes somewhere.
        """
        rest = Traffic()

        for name in ("payload", "messages", "shm", "control"):
            counts = getattr(self, name)
            taken = getattr(part, name)

            left = {key: count - taken.get(key, 0) for key, count in counts.items()}
            assert set(taken) <= set(counts) and min(left.values(), default=0) >= 0, (
                f"{part} is no part of {self}"
            )

            # An edge without bytes is left out, as it would be had it never been used.
            getattr(rest, name).update({key: count for key, count in left.items() if count})

        return rest

    def moved(self, ranks: Sequence[int]) -> Traffic:
        """The same traffic where local rank i is world rank `ranks[i]`.

        Predictions are made for ranks 0, 1, .. and moved to where a replica stands in the run.
        """
        payload, messages, shm = (
            {(ranks[a], ranks[b]): count for (a, b), count in counts.items()}
            for counts in (self.payload, self.messages, self.shm)
        )

        control = {ranks[rank]: count for rank, count in self.control.items()}

        return Traffic(payload, messages, shm, control)

    def times(self, factor: int) -> Traffic:
        """The same traffic `factor` times; nothing where factor is 0."""
        if factor == 0:
            return Traffic()

        payload, messages, shm = (
            {edge: count * factor for edge, count in counts.items()}
            for counts in (self.payload, self.messages, self.shm)
        )

        control = {rank: count * factor for rank, count in self.control.items()}

        return Traffic(payload, messages, shm, control)

    @property
    def payload_bytes(self) -> int:
        """Bytes of vectors on a wire, the sum over all edges."""
        return sum(self.payload.values())

    @property
    def shm_bytes(self) -> int:
        """Bytes of vectors through shared memory, the sum over all edges.

        No wire sees them, so they are in none of the other sums.
        """
        return sum(self.shm.values())

    @property
    def control_bytes(self) -> int:
        """Bytes of tickets, flags and counters, the sum over all ranks."""
        return sum(self.control.values())

    @property
    def num_messages(self) -> int:
        """Number of sends, the sum over all edges."""
        return sum(self.messages.values())

    @property
    def busiest_port_bytes(self) -> int:
        """The most payload that one rank sends, or receives (ports are full duplex)."""
        return self.busiest_port()

    def busiest_port(self, ports: Sequence[int] = ()) -> int:
        """The most payload that one port sends, or receives.

        `ports` holds the number of each rank's port, where several ranks share one, for instance
        those of a host; without it every rank has its own. What stays behind one port is not
        counted.
        """
        sums: dict[tuple[str, int], int] = {}  # (direction, port) -> bytes

        for (source, destination), count in self.payload.items():
            out, into = (ports[source], ports[destination]) if ports else (source, destination)

            if out != into:
                sums["out", out] = sums.get(("out", out), 0) + count
                sums["in", into] = sums.get(("in", into), 0) + count

        return max(sums.values(), default=0)

    def to_json(self) -> dict[str, Any]:
        """A document of lists, sorted, because JSON has no keys that are pairs.

        `{payload: [[source, destination, bytes]], messages: .., shm: .., control: [[source,
        bytes]]}`.
        """
        document: dict[str, Any] = {
            name: [[a, b, count] for (a, b), count in sorted(getattr(self, name).items())]
            for name in ("payload", "messages", "shm")
        }

        return document | {
            "control": [[rank, count] for rank, count in sorted(self.control.items())]
        }

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Traffic:
        """The traffic that `to_json` wrote."""
        payload, messages, shm = (
            {(int(a), int(b)): int(count) for a, b, count in document[name]}
            for name in ("payload", "messages", "shm")
        )

        control = {int(rank): int(count) for rank, count in document["control"]}

        return Traffic(payload, messages, shm, control)
