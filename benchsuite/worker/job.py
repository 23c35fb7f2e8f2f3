"""What a launcher hands to one rank, `RankJob`, and how the rank hands its record back.

A `RankJob` is plain data and crosses the fork server by pickle. The record is a file in the run
directory. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RankJob:
    """One rank of one cell, as plain data. `benchsuite.worker.main.run_rank(job)` is its life."""

    cell: Mapping[str, Any]  # Cell.to_json(), resolved
    rank: int
    world_size: int
    local_rank: int = 0
    hosts: tuple[int, ...] = ()  # host number of each rank; () = all on host 0
    # The rank writes rank<k>.json here, atomically (temporary file, fsync, replace).
    run_dir: str = ""
    # Where the run's store is, or is to be hosted by rank 0.
    store_host: str = "127.0.0.1"
    store_port: int = 0
    # Rank 0 only: a bound, listening socket on which it hosts the TCPStore.
    store_listen_fd: int | None = None
    # Someone else (torchrun's agent) hosts the store: every rank is a client.
    store_is_hosted: bool = False
    store_prefix: str = ""  # separates the cells of one job in a shared store
    # A hang is the launcher's to judge, so process groups wait a little longer than it does.
    timeout_s: float = 120.0  # the launcher's deadline; process groups get this + 5 s
    interface: str = "lo"  # network interface for gloo
    # The ranks are alone in a network namespace: interface counters are theirs.
    private_network: bool = False
    network_reason: str = ""  # why there is no private network
    beat_path: str = ""  # mmap file of `measure/beat.py`; "" = no beat


# Exit codes, by which a launcher knows how a process ended.
EXIT_OK = 0
EXIT_ERROR = 1
EXIT_NO_NAMESPACE = 70  # of the cell host: no private network
EXIT_CANNOT_WRITE = 74  # disk full or not writable
EXIT_ABORTED = 98  # another rank's end was announced
EXIT_PARENT_GONE = 99


def rank_file(rank: int) -> str:
    """File name of a rank's record inside the run directory."""
    return f"rank{rank}.json"


def error_file(run_dir: str | Path, rank: int) -> Path:
    """Where a rank that raised leaves the last line of its traceback."""
    return Path(run_dir) / f"rank{rank}.error"


class CannotWrite(OSError):
    """The run directory takes no more: the disk is full, a quota is used up, or it is read-only.

    A rank that meets it ends with EXIT_CANNOT_WRITE, so that the user is told about the disk and
    not about the strategy.
    """


def write_rank_file(run_dir: str | Path, rank: int, content: str | bytes) -> Path:
    """Writes a rank's record whole or not at all, then its marker; returns the record's path.

    The marker `rank<k>.ok` holds the record's size: whoever waits can see that the record is
    complete without parsing it. CannotWrite where the directory takes no more.
    """
    path = Path(run_dir) / rank_file(rank)
    data = content.encode() if isinstance(content, str) else content
    # The marker comes second: whoever sees it may read the record.
    write_atomic(path, data)
    write_atomic(path.with_suffix(".ok"), b"%d\n" % len(data))

    return path


def rank_complete(run_dir: str | Path, rank: int) -> bool:
    """Whether the rank's record is there and is as long as its marker says."""
    path = Path(run_dir) / rank_file(rank)

    try:
        return path.stat().st_size == int(path.with_suffix(".ok").read_bytes())
    except (OSError, ValueError):
        return False


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees all of it or nothing.

    It is written under a temporary name in the same folder, synchronised to disk, and then renamed.
    On failure nothing is left behind.
    """
    # In the same folder, so that the renaming stays inside one file system and is atomic.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a power cut may not leave a name without its content

        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CannotWrite(error.errno, error.strerror, str(path)) from error
