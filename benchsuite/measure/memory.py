"""A rank's peak memory, the highest resident set of its process, and its allocator.

Shared pages count. A forked child does not inherit its parent's peak, but starts at what was
resident when it was forked: a rank from a preloaded fork server starts at the size of torch.
`reset_peak` sets the mark down to what is resident now.

All is read from /proc, which has a peak that can be reset; psutil has none. Imports no torch.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

# Names of malloc.h, for `mallopt`.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# Variables that glibc reads: who sets one has tuned the allocator.
_USERS_CHOICE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@dataclass
class RankMemory:
    """Resident sets of a rank: before there is a model, at most while it is trained, and at most in
    all.

    What training takes is the peak of building and of the loop minus the base: parameters,
    gradient, optimiser state, activations, buffers of strategy and communication, snapshots; also
    code that is touched for the first time (some MB). Imports and data are in the base, the
    evaluation after the loop is left out.
    """

    base_rss_bytes: int | None = None
    peak_model_bytes: int | None = None
    _before: int = 0  # the peak until the model was built

    def begin_model(self) -> None:
        """Called right before the model is built: what is resident now is the base."""
        self._before = peak_rss_bytes()
        give_back_freed()
        reset_peak()
        self.base_rss_bytes = rss_bytes()

    def end_loop(self) -> None:
        """Called right after the loop: what the model took is known now."""
        if self.base_rss_bytes is not None:
            self.peak_model_bytes = max(0, peak_rss_bytes() - self.base_rss_bytes)

    @property
    def peak_rss_bytes(self) -> int:
        """The highest resident set of the process until now."""
        return max(self._before, peak_rss_bytes())


def peak_rss_bytes() -> int:
    """The highest resident set since the start, the fork, or the last `reset_peak`."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak

    unit = 1 if sys.platform == "darwin" else 1024  # KiB everywhere but there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def rss_bytes() -> int | None:
    """The resident set now; None where the system does not say."""
    return _status("VmRSS")


def available_bytes() -> int | None:
    """What the system can still give to processes; None where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None

    return None


def reset_peak() -> bool:
    """Sets the peak down to what is resident now.

    False where that is not allowed: a peak is then since the fork.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False

    return True


def give_back_freed() -> None:
    """Lets glibc return what is free to the kernel: what is resident afterwards is in use."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed, unless the user tuned it by a variable.

    Tensors come and go by megabytes. Giving them back to the kernel each time costs a step of
    ResNet-18 19,000 page faults, a sixth to a quarter of its time, and a group of simulated
    gradients half of it.
    """
    libc = ctypes.CDLL(None)

    tuned_by_user = any(name in os.environ for name in _USERS_CHOICE)
    if hasattr(libc, "mallopt") and not tuned_by_user:  # else another library than glibc
        if not libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30):
            # Before glibc 2.35 half a heap is the most.
            libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)

        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def _status(name: str) -> int | None:
    """A size in /proc/self/status, in bytes; None where there is no such line or file."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith(f"{name}:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None

    return None
