"""How busy the machine was while a cell ran, and who kept it busy: `contended` and
`oversubscribed`.

No torch.

Foreign CPU share = (busy time of our cores - CPU time of the run's own process tree, dead children
included) divided by what our cores had to give. Above 5 % a run is `contended`. Interrupt time
belongs to no process, and on loopback it is our own messages': it is left out on both sides.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchsuite.plan.cell import Cell

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
        """Share of our cores' time that others used, 0 to 1."""
        if self.busy_s is None or self.own_s is None or self.seconds <= 0:
            return None

        return max(0.0, self.busy_s - self.own_s) / (self.seconds * self.cores)

    @property
    def contended(self) -> bool:
        """More than 5 % of our cores went to others."""
        share = self.foreign_share
        return share is not None and share > CONTENDED_ABOVE


class CpuMeter:
    """Starts when it is made (or by `start`); `read` gives the load since then.

    `root`: the process whose tree is ours, default this one: command, cell host, fork server,
    ranks. Call `read` while the tree still hangs together; what a parent has waited for is in its
    own account.
    """

    def __init__(self, root: int | None = None) -> None:
        self._root = os.getpid() if root is None else root
        self._cpus = affinity()
        self.start()

    def start(self) -> None:
        """The interval begins here."""
        self._since = time.monotonic()
        self._busy, self._own = busy_s(self._cpus), tree_cpu_s(self._root)

    def read(self) -> CpuLoad:
        """The load since `start`; the interval goes on."""
        seconds = time.monotonic() - self._since
        cores = num_cores()
        busy = busy_s(self._cpus)
        own = tree_cpu_s(self._root)

        if busy is None or own is None or self._busy is None or self._own is None:
            return CpuLoad(
                seconds, cores, None, None, "this system tells no CPU times (no /proc, no psutil)"
            )

        return CpuLoad(seconds, cores, busy - self._busy, max(0.0, own - self._own))


def oversubscribed(cell: Cell, cores: int | None = None) -> bool:
    """(workers + servers) x threads > cores: a sleeping straggler's core counts too.

    Never under the virtual clock.
    """
    if cell.clock == "virtual" or cell.device != "cpu":
        return False

    ranks_here = math.ceil(cell.world_size / cell.hosts)
    return ranks_here * cell.threads > (num_cores() if cores is None else cores)


def affinity() -> frozenset[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))

    return frozenset(range(os.cpu_count() or 1))


def num_cores() -> int:
    """How many cores can work for us at once: the affinity mask, or a container's smaller CPU
    quota.
    """
    quota = cpu_quota()
    return len(affinity()) if quota is None else max(1, min(len(affinity()), math.floor(quota)))


def cpu_quota() -> float | None:
    """Cores by the container's quota (cgroup v2 or v1); None = no quota."""
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
    """CPU seconds since boot that these cores spent in processes or were taken by a hypervisor."""
    wanted = {f"cpu{number}" for number in cpus}

    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return _busy_by_psutil(wanted)

    total = 0
    for line in lines:
        name, *ticks = line.split()
        if name in wanted:
            user, nice, system, _, _, _, _, *steal = map(int, ticks[:8])
            total += user + nice + system + sum(steal)

    return total * _TICK_S


def tree_cpu_s(root: int) -> float | None:
    """CPU seconds of a process, its living descendants, and all that any of them has waited for."""
    processes: dict[int, tuple[int, int]] = {}  # pid -> (parent, ticks)

    try:
        entries = [entry for entry in os.listdir("/proc") if entry.isdigit()]
    except OSError:
        return _tree_by_psutil(root)

    for entry in entries:
        try:
            text = Path(f"/proc/{entry}/stat").read_text(errors="replace")
        except OSError:
            continue  # it has just ended

        fields = text.rpartition(")")[2].split()  # the name before may hold spaces and brackets
        processes[int(entry)] = (
            int(fields[1]),
            sum(map(int, fields[11:15])),
        )  # utime stime cutime cstime

    if root not in processes:
        return _tree_by_psutil(root)

    children: dict[int, list[int]] = {}
    for pid, (parent, _) in processes.items():
        children.setdefault(parent, []).append(pid)
    waiting = [root]
    ticks = 0

    while waiting:
        pid = waiting.pop()
        ticks += processes[pid][1]
        waiting += children.get(pid, [])

    return ticks * _TICK_S


def _busy_by_psutil(wanted: set[str]) -> float | None:
    try:
        import psutil
    except ImportError:
        return None

    times = [
        t for number, t in enumerate(psutil.cpu_times(percpu=True)) if f"cpu{number}" in wanted
    ]
    return float(
        sum(t.user + t.system + getattr(t, "nice", 0.0) + getattr(t, "steal", 0.0) for t in times)
    )


def _tree_by_psutil(root: int) -> float | None:
    try:
        import psutil
    except ImportError:
        return None

    try:
        parent = psutil.Process(root)
        times = [process.cpu_times() for process in [parent, *parent.children(recursive=True)]]
    except psutil.Error:
        return None

    kinds = ("user", "system", "children_user", "children_system")
    return float(sum(getattr(t, kind, 0.0) for t in times for kind in kinds))
