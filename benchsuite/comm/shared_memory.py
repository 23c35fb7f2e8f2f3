"""Vectors and locks shared by the ranks of one host, without a name in any file system.

Rank 0 makes an anonymous memory file and publishes `pid:fd`; peers open it through /proc. Nothing
is left after a crash. Ranks must share a pid namespace (the cell host's ranks do).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
from typing import Any

import torch
from torch import Tensor

# MAP_POPULATE: the pages are there before anybody is timed. Without it the first step of a run pays
# for them, 280 ms for 256 MiB.
_MAPPED = mmap.MAP_SHARED | mmap.MAP_POPULATE


def create_vector(numel: int, dtype: torch.dtype) -> tuple[Tensor, Any, str]:
    """Makes a vector that other processes of the host can open.

    Returns the zeroed vector (numel,), what must be kept alive with it, and its address for
    `attach_vector`.
    """
    size = max(numel * dtype.itemsize, 1)  # an empty file cannot be mapped
    fd = os.memfd_create("benchsuite")

    # Taken now: a sparse mapping would be a SIGBUS in the middle of a run where memory is full.
    os.posix_fallocate(fd, 0, size)

    memory = mmap.mmap(fd, size, flags=_MAPPED)
    vector = torch.frombuffer(memory, dtype=dtype, count=numel)

    # The file stays open as long as a peer may want to open it through /proc.

    return (
        vector,
        (memory, _Open(fd)),
        f"{os.getpid()}:{fd}",
    )


def attach_vector(address: str, numel: int, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Opens the memory that another rank made: the vector (numel,), and what keeps it alive.

    The mapping outlives the file descriptor, which is closed at once.
    """
    fd = _open(address)

    memory = mmap.mmap(fd, max(numel * dtype.itemsize, 1), flags=_MAPPED)
    os.close(fd)

    return torch.frombuffer(memory, dtype=dtype, count=numel), memory


class _Open:
    """A file descriptor that is open as long as somebody keeps it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


def _open(address: str) -> int:
    """A file descriptor of one's own for `pid:fd`, the open file of another process.

    Opened through /proc it is a new open file description, not a copy of the old one: two of them
    can exclude each other by flock.
    """
    pid, fd = address.split(":")
    return os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


class FileLock:
    """A lock that excludes threads and processes alike.

    It is flock on an open file description of its own. The kernel lets go of it when its owner
    dies, so no crash leaves a lock behind. Rank 0 keeps the file itself open in `keeper`.
    """

    def __init__(self, fd: int, keeper: _Open | None = None) -> None:
        self._file = _Open(fd)
        self._keeper = keeper

    @staticmethod
    def create() -> tuple[FileLock, str]:
        """Makes a lock; returns it with its address for `attach`."""
        name = f"benchsuite-lock-{secrets.token_hex(4)}"
        keeper = _Open(os.memfd_create(name))

        address = f"{os.getpid()}:{keeper.fd}"

        return FileLock(_open(address), keeper), address

    @staticmethod
    def attach(address: str) -> FileLock:
        """Opens the lock that another rank made."""
        return FileLock(_open(address))

    def __enter__(self) -> FileLock:
        fcntl.flock(self._file.fd, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._file.fd, fcntl.LOCK_UN)
