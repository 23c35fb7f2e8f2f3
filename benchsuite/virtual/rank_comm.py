"""`RankComm`: what lanes, locks, messages and receives of the virtual world see of a comm."""

from __future__ import annotations

from typing import Protocol

from benchsuite.virtual.clock import VirtualClock
from benchsuite.virtual.schedule import Schedule


class Wires(Protocol):
    """What a receive asks of the world: how long it takes to copy what has arrived."""

    receive_ns_per_byte: float


class RankComm(Protocol):
    """The side of `VirtualComm` that its own pieces see."""

    rank: int
    wait_ns: int
    mine: int  # the world rank
    clock: VirtualClock
    schedule: Schedule | None

    @property
    def world(self) -> Wires:
        """The world that the rank is in."""
