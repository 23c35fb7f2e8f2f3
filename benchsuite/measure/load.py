"""How busy the machine was while a cell ran: `contended` and `oversubscribed`.

The share of others = (busy time of our cores - CPU time of the run's own process tree, dead
children included) divided by what our cores had to give. Above 5 % a run is `contended`. Interrupt
time belongs to no process, and on loopback it is our own messages': it is left out on both sides.

All is read from /proc and not by psutil, as in `memory.py`: psutil has no peak that can be reset,
and there is one way to read, not two. Where there is no /proc there are no figures, and the reason
says so. Imports no torch.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchsuite.plan.cell import Cell

# Share of our cores' time that others may use before a run is called contended.
CONTENDED_ABOVE = 0.05
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class CpuLoad:
    """CPU seconds of an interval. `reason` says why there are no figures."""

    seconds: float  # of the wall clock
    cores: int
    busy_s: float | None  # our cores, whoever used them
    own_s: float | None  # the process tree
    reason: str | None = None

    @property
    def foreign_share(self) -> float | None:
        """The share of our cores' time that others used, 0 to 1; None where it is not known."""
        if self.busy_s is None or self.own_s is None or self.seconds <= 0:
            return None

        return max(0.0, self.busy_s - self.own_s) / (self.seconds * self.cores)

    @property
    def contended(self) -> bool:
        """Whether more than 5 % of our cores' time went to others."""
        share = self.foreign_share
        return share is not None and share > CONTENDED_ABOVE


class CpuMeter:
    """Measures the load of an interval, which begins when the meter is made, or at `start`.

    root: the process whose tree is ours, by default this one: command, cell host, fork server,
    ranks. Call `read` while the tree still hangs together; what a parent has waited for is in its
    own account.
    """

    def __init__(self, root: int | None = None) -> None:
        self._root = os.getpid() if root is None else root
        self._cpus = affinity()
        self.start()

    def start(self) -> None:
        """Begins the interval here."""
        self._since = time.monotonic()
        self._busy = busy_s(self._cpus)
        self._own = tree_cpu_s(self._root)

    def read(self) -> CpuLoad:
        """The load since `start`; the interval goes on."""
        seconds = time.monotonic() - self._since
        cores = num_cores()
        busy = busy_s(self._cpus)
        own = tree_cpu_s(self._root)

        if busy is None or own is None or self._busy is None or self._own is None:
            return CpuLoad(seconds, cores, None, None, "this system tells no CPU times (no /proc)")

        return CpuLoad(seconds, cores, busy - self._busy, max(0.0, own - self._own))


def oversubscribed(cell: Cell, cores: int | None = None) -> bool:
    """Whether the ranks of a host want more cores than there are.

    (workers + servers) x threads > cores: a sleeping straggler's core counts too. Never under the
    virtual clock, nor on devices.
    """
    if cell.clock == "virtual" or cell.device != "cpu":
        return False

    ranks_here = math.ceil(cell.world_size / cell.hosts)
    if cores is None:
        cores = num_cores()
    return ranks_here * cell.threads > cores


def affinity() -> frozenset[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))

    return frozenset(range(os.cpu_count() or 1))


def num_cores() -> int:
    """How many cores can work for us at once.

    The affinity mask, or a container's CPU quota where that is smaller.
    """
    allowed = len(affinity())
    quota = cpu_quota()
    if quota is None:
        return allowed
    return max(1, min(allowed, math.floor(quota)))


def cpu_quota() -> float | None:
    """Cores that the container's quota allows (cgroup v2 or v1); None = no quota."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
    except (OSError, ValueError):
        try:
            folder = Path("/sys/fs/cgroup/cpu")
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        except OSError:
            return None

    try:
        return None if int(quota) <= 0 else int(quota) / int(period)
    except ValueError:  # "max"
        return None


def busy_s(cpus: Iterable[int]) -> float | None:
    """CPU seconds since boot that these cores spent in processes, or a hypervisor took from them.

    None where the system has no /proc.
    """
    wanted = {f"cpu{number}" for number in cpus}

    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None

    total = 0
    for line in lines:
        name, *ticks = line.split()
        if name in wanted:
            # user nice system idle iowait irq softirq steal; what follows is counted in user.
            user, nice, system, _, _, _, _, *steal = map(int, ticks[:8])
            total += user + nice + system + sum(steal)

    return total * _TICK_S


def tree_cpu_s(root: int) -> float | None:
    """CPU seconds of a process, its living descendants, and all that any of them has waited for.

    None where the system has no /proc, or the process is gone.
    """
    processes: dict[int, tuple[int, int]] = {}  # pid -> (parent, ticks)

    try:
        entries = [entry for entry in os.listdir("/proc") if entry.isdigit()]
    except OSError:
        return None

    for entry in entries:
        try:
            text = Path(f"/proc/{entry}/stat").read_text(errors="replace")
        except OSError:
            continue  # it has just ended

        # The process's name stands before, and may hold spaces and brackets itself.
        fields = text.rpartition(")")[2].split()
        parent = int(fields[1])
        ticks = sum(map(int, fields[11:15]))  # utime stime cutime cstime
        processes[int(entry)] = (parent, ticks)

    if root not in processes:
        return None

    children: dict[int, list[int]] = {}
    for pid, (parent, _) in processes.items():
        children.setdefault(parent, []).append(pid)
    # From the root down, each process once.
    waiting = [root]
    total = 0

    while waiting:
        pid = waiting.pop()
        total += processes[pid][1]
        waiting += children.get(pid, [])

    return total * _TICK_S
