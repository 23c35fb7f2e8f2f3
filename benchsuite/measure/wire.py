"""Bytes on the wire by the kernel's interface counters, where the run has its network to itself.

These are the transmitted bytes of `lo` in the run's private namespace (each byte once), or of a
host's own veth. They are read from /proc/thread-self/net/dev; never from /sys, which shows the
namespace that mounted it. A reading is barrier, read, barrier, so that nothing is under way; what
such a reading costs itself is measured while idle and taken off.

The layer is that of the interface: a veth or `lo` with segmentation offload counts one header per
super-packet. Imports no torch.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_IDLE = 5  # idle readings; their median is what a reading costs


@dataclass(frozen=True)
class Counters:
    """One reading of an interface.

    `retransmits` are those of this thread's whole network namespace.
    """

    tx_bytes: int
    tx_packets: int
    retransmits: int  # TCP segments sent again


@dataclass(frozen=True)
class WireBytes:
    """What was sent between two readings.

    `bytes` is None, with the reason, where others use the network too.
    """

    bytes: int | None = None
    packets: int | None = None
    idle_bytes: int | None = None  # what one reading costs; already taken off
    retransmits: int | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The plain form for the run file."""
        return dict(vars(self))


class WireMeter:
    """Reads the counters around what is measured: `start` and `stop`.

    Every rank calls both, since both hold barriers. `reads = False` on all ranks but one per
    network namespace: the counters are the namespace's, not the rank's.
    """

    def __init__(
        self,
        barrier: Callable[[], None],
        *,
        interface: str = "lo",
        private: bool,
        reason: str = "",
        reads: bool = True,
    ) -> None:
        self._barrier = barrier
        self._interface = interface
        self._reason = ""  # why nothing is read
        if not private:
            self._reason = reason or "no private network: the counters are the whole machine's"
        elif not reads:
            self._reason = "counted by another rank of this host"

    def start(self) -> None:
        """Finds out what a reading costs, then takes the first one."""
        readings = [self._read() for _ in range(NUM_IDLE + 1)]
        taken = [reading for reading in readings if reading is not None]
        # Between two readings of an idle network lies what a reading itself sends.
        num_bytes = [
            after.tx_bytes - before.tx_bytes for before, after in itertools.pairwise(taken)
        ]
        packets = [
            after.tx_packets - before.tx_packets for before, after in itertools.pairwise(taken)
        ]
        self._idle_bytes = round(statistics.median(num_bytes or [0]))
        self._idle_packets = round(statistics.median(packets or [0]))
        self._first = readings[-1]

    def stop(self) -> WireBytes:
        """What was sent since `start`, without the reading's own share."""
        last = self._read()
        if self._first is None or last is None:
            return WireBytes(reason=self._reason)

        return WireBytes(
            bytes=max(0, last.tx_bytes - self._first.tx_bytes - self._idle_bytes),
            packets=max(0, last.tx_packets - self._first.tx_packets - self._idle_packets),
            idle_bytes=self._idle_bytes,
            retransmits=last.retransmits - self._first.retransmits,
        )

    def _read(self) -> Counters | None:
        """Barrier, read, barrier; None where nothing can be read.

        Every rank takes part in the barriers, also those that do not read.
        """
        self._barrier()
        counters = None

        if not self._reason:
            try:
                counters = read_counters(self._interface)
            except (OSError, LookupError, ValueError) as error:
                self._reason = f"interface counters of {self._interface!r}: {error}"

        self._barrier()
        return counters


def read_counters(interface: str = "lo") -> Counters:
    """The counters now. LookupError names the interfaces there are."""
    table: dict[str, list[str]] = {}
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        table[name.strip()] = numbers.split()

    if interface not in table:
        raise LookupError(
            f"no such interface in this namespace; there are: {', '.join(sorted(table)) or 'none'}"
        )

    values = table[interface]  # 8 columns received, then 8 transmitted: bytes, packets ..
    return Counters(tx_bytes=int(values[8]), tx_packets=int(values[9]), retransmits=_retransmits())


def _retransmits() -> int:
    """TCP segments that this network namespace has sent again."""
    lines = [line.split() for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()]
    names, values = (line for line in lines if line[0] == "Tcp:")
    return int(values[names.index("RetransSegs")])
