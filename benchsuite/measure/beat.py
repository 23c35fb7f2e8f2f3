"""The beat: where a rank is right now, readable by others also when the rank hangs or is dead.

It is one 40-byte file per rank, mapped into memory: pid, step, sequence, phase, time. `enter`
writes all five, so whoever waits for the ranks can say which one stopped where. The file is
allocated before it is mapped: writing to a sparse mapping on a full disk is a SIGBUS. Imports no
torch.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from benchsuite.plan.faults import Phase as Phase

_LAYOUT = struct.Struct("=qqqqq")
# Looked up once, since every step enters several phases.
_pack = _LAYOUT.pack_into
_clock = time.monotonic_ns  # one clock for all processes of a machine

# Phases in which others may be the reason that a rank stays.
WAITING = frozenset({Phase.SEND, Phase.RECV, Phase.BARRIER, Phase.SERVE})


class Pulse(NamedTuple):
    """One reading of a beat; all zero where the rank never began."""

    pid: int = 0
    step: int = 0
    seq: int = 0  # number of `enter`s so far
    phase: int = 0
    time_ns: int = 0  # CLOCK_MONOTONIC

    @property
    def phase_name(self) -> str:
        """Lower case, as in a cell's `faults`."""
        return Phase(self.phase).name.lower()


class Beat:
    """The writer's side of a beat, one per rank."""

    def __init__(
        self, path: str | Path = "", *, faults: Mapping[int, Callable[[int], None]] | None = None
    ) -> None:
        """Maps the file `path`; "" = nobody reads.

        faults: phase -> what to call with the step after the phase was entered.
        """
        self._pid = os.getpid()
        self._seq = 0
        self._faults = faults
        self._view: mmap.mmap | bytearray = _map(path) if path else bytearray(_LAYOUT.size)
        _pack(self._view, 0, self._pid, 0, 0, Phase.START, _clock())

    def enter(self, phase: int, step: int) -> None:
        """Says that this rank is now in `phase` of `step`. Takes under 1 us."""
        self._seq += 1
        _pack(self._view, 0, self._pid, step, self._seq, phase, _clock())
        if self._faults is not None and phase in self._faults:
            self._faults[phase](step)


def create(path: str | Path) -> None:
    """Allocates an empty beat (all zero), before the rank exists.

    OSError, and no file is left, where the disk is full.
    """
    try:
        _map(path).close()
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def read(path: str | Path) -> Pulse:
    """The last beat of a rank; all zero where it never got as far, or the file is of another
    kind.
    """
    try:
        data = Path(path).read_bytes()
    except OSError:
        return Pulse()

    if len(data) != _LAYOUT.size:
        return Pulse()

    pulse = Pulse(*_LAYOUT.unpack(data))
    # A number that is no phase: the file is of something else.
    return pulse if pulse.phase in Phase._value2member_map_ else Pulse()


def _map(path: str | Path) -> mmap.mmap:
    """The file mapped into memory, its blocks allocated."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, _LAYOUT.size)
        return mmap.mmap(descriptor, _LAYOUT.size)
    finally:
        os.close(descriptor)
