"""`VirtualWorld`: what all `VirtualComm`s of a run share, by the names of their comms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchsuite.virtual.clock import VirtualClock
from benchsuite.virtual.comm_lane import LockState
from benchsuite.virtual.comm_parts import Channel, Meeting, Tickets
from benchsuite.virtual.network import Network
from benchsuite.virtual.schedule import Schedule

# (name of a counter, world rank) -> what `fetch_add` answers.
CounterAnswers = Callable[[str, int], int]


class VirtualWorld:
    """Clock, network, and everything under way between the comms of a run.

    receive_ns_per_byte: a receiver's own time for copying and adding what has arrived.
    counter_answers: what counters answer, where a recorded run is replayed. schedule: where what
    the run does is recorded.
    """

    def __init__(
        self,
        clock: VirtualClock,
        network: Network,
        *,
        receive_ns_per_byte: float = 0.0,
        posts_ahead: bool = True,
        counter_answers: CounterAnswers | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.clock = clock
        self.network = network
        self.schedule = schedule
        self.receive_ns_per_byte = receive_ns_per_byte
        self.posts_ahead = posts_ahead
        self._counter_answers = counter_answers

        # Everything below is made when a comm first asks for it, and is named by that comm.
        self._channels: dict[tuple[str, int, int], Channel] = {}
        self._meetings: dict[tuple[str, int], Meeting] = {}
        self._tickets: dict[tuple[str, int], Tickets] = {}
        self._counters: dict[tuple[str, str], int] = {}
        self._vectors: dict[tuple[str, str], Tensor] = {}
        self._locks: dict[tuple[str, str], LockState] = {}

    def channel(self, comm: str, source: int, destination: int) -> Channel:
        """The channel of a comm from one rank to another."""
        return self._channels.setdefault((comm, source, destination), Channel())

    def tickets(self, comm: str, rank: int) -> Tickets:
        """The tickets that wait for a rank of a comm."""
        return self._tickets.setdefault((comm, rank), Tickets())

    def meeting(self, comm: str, number: int, size: int) -> Meeting:
        """The collective of this number of a comm; the first rank to ask makes it."""
        key = (comm, number)
        if key not in self._meetings:
            self._meetings[key] = Meeting(size)
        return self._meetings[key]

    def close(self, comm: str, number: int) -> None:
        """Forgets a collective that everybody has entered."""
        del self._meetings[comm, number]

    def fetch_add(self, comm: str, name: str, n: int, rank: int) -> int:
        """Adds to a counter of a comm; returns its value before."""
        if self._counter_answers is not None:
            return self._counter_answers(name, rank)

        value = self._counters.get((comm, name), 0)
        # One thread runs all ranks, so nobody comes between reading and writing.
        self._counters[comm, name] = value + n
        return value

    def shared(self, comm: str, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """The vector that all ranks of a comm share under this name, zeroed when it is made."""
        key = (comm, name)
        if key not in self._vectors:
            self._vectors[key] = torch.zeros(numel, dtype=dtype)
        return self._vectors[key]

    def lock(self, comm: str, name: str) -> LockState:
        """The lock that all ranks of a comm share under this name."""
        return self._locks.setdefault((comm, name), LockState())
