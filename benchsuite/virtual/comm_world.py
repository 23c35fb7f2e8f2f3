"""`VirtualWorld`: what all `VirtualComm`s of a run share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchsuite.virtual.clock import VirtualClock
from benchsuite.virtual.comm_lane import LockState
from benchsuite.virtual.comm_parts import Channel, Meeting, Tickets
from benchsuite.virtual.network import Network
from benchsuite.virtual.schedule import Schedule

Script = Callable[[str, int], int]  # (counter, world rank) -> what fetch_add answers


class VirtualWorld:
    """What all comms of a run share.

    receive_ns_per_byte: a receiver's own time for copying and adding what has arrived. script:
    answers of counters, where a recorded run is replayed. schedule: what the run does is recorded
    there.
    """

    def __init__(
        self,
        clock: VirtualClock,
        network: Network,
        *,
        receive_ns_per_byte: float = 0.0,
        posts_ahead: bool = True,
        script: Script | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.clock = clock
        self.network = network
        self.schedule = schedule
        self.receive_ns_per_byte = receive_ns_per_byte
        self.posts_ahead = posts_ahead
        self._script = script
        self._channels: dict[tuple[str, int, int], Channel] = {}
        self._meetings: dict[tuple[str, int], Meeting] = {}
        self._tickets: dict[tuple[str, int], Tickets] = {}
        self._counters: dict[tuple[str, str], int] = {}
        self._vectors: dict[tuple[str, str], Tensor] = {}
        self._locks: dict[tuple[str, str], LockState] = {}

    def channel(self, comm: str, source: int, destination: int) -> Channel:
        """Of one comm, from one rank to another."""
        return self._channels.setdefault((comm, source, destination), Channel())

    def tickets(self, comm: str, rank: int) -> Tickets:
        """The tickets that wait for a rank of a comm."""
        return self._tickets.setdefault((comm, rank), Tickets())

    def meeting(self, comm: str, number: int, size: int) -> Meeting:
        """The collective of this number of a comm."""
        key = (comm, number)
        if key not in self._meetings:
            self._meetings[key] = Meeting(size)
        return self._meetings[key]

    def close(self, comm: str, number: int) -> None:
        """Everybody has entered this collective."""
        del self._meetings[comm, number]

    def fetch_add(self, comm: str, name: str, n: int, rank: int) -> int:
        """A counter of a comm."""
        if self._script is not None:
            return self._script(name, rank)
        value = self._counters.get((comm, name), 0)
        self._counters[comm, name] = value + n
        return value

    def shared(self, comm: str, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """One zeroed vector per comm and name."""
        key = (comm, name)
        if key not in self._vectors:
            self._vectors[key] = torch.zeros(numel, dtype=dtype)
        return self._vectors[key]

    def lock(self, comm: str, name: str) -> LockState:
        """One lock per comm and name."""
        return self._locks.setdefault((comm, name), LockState())
