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

_MAPPED = (
    mmap.MAP_SHARED | mmap.MAP_POPULATE
)  # pages are there before anybody is timed: 280 ms for 256 MiB


def create_vector(numel: int, dtype: torch.dtype) -> tuple[Tensor, Any, str]:
    """(zeroed vector, what must be kept alive with it, its address for `attach_vector`)."""
    size = max(numel * dtype.itemsize, 1)
    fd = os.memfd_create("benchsuite")
    os.posix_fallocate(fd, 0, size)  # a sparse mapping would be SIGBUS on a full memory
    memory = mmap.mmap(fd, size, flags=_MAPPED)

    return (
        torch.frombuffer(memory, dtype=dtype, count=numel),
        (memory, _Open(fd)),
        f"{os.getpid()}:{fd}",
    )


def attach_vector(address: str, numel: int, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """The same memory in another rank."""
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
    pid, fd = address.split(":")
    return os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


class FileLock:
    """flock on an open file description of its own: excludes threads and processes alike."""

    def __init__(self, fd: int, keeper: _Open | None = None) -> None:
        self._file = _Open(fd)
        self._keeper = keeper

    @staticmethod
    def create() -> tuple[FileLock, str]:
        """(the lock, its address)."""
        keeper = _Open(os.memfd_create(f"benchsuite-lock-{secrets.token_hex(4)}"))
        address = f"{os.getpid()}:{keeper.fd}"

        return FileLock(_open(address), keeper), address

    @staticmethod
    def attach(address: str) -> FileLock:
        """The same lock in another rank."""
        return FileLock(_open(address))

    def __enter__(self) -> FileLock:
        fcntl.flock(self._file.fd, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._file.fd, fcntl.LOCK_UN)
