"""What a launcher hands to one rank: `RankJob`. Plain data, no torch, crosses the fork server by pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RankJob:
    """One rank of one cell. `benchsuite.worker.run_rank(job)` is its life."""

    cell: Mapping[str, Any]  # Cell.to_json(), resolved
    rank: int
    world_size: int
    local_rank: int = 0
    hosts: tuple[int, ...] = ()  # host number of each rank; () = all on host 0
    run_dir: str = ""  # the rank writes rank<k>.json here, atomically (temporary file, fsync, replace)
    store_host: str = "127.0.0.1"
    store_port: int = 0
    store_listen_fd: int | None = None  # rank 0: a bound, listening socket to host the TCPStore on
    store_is_hosted: bool = False  # someone else (torchrun's agent) hosts the store: every rank is a client
    store_prefix: str = ""  # separates the cells of one job in a shared store
    timeout_s: float = 120.0  # the launcher's deadline; process groups get this + 5 s
    interface: str = "lo"  # network interface for gloo
    private_network: bool = False  # the ranks are alone in a network namespace: interface counters are theirs
    network_reason: str = ""  # why there is no private network
    beat_path: str = ""  # mmap file of `measure/beat.py`; "" = no beat
    clock_offset_ns: int = 0


EXIT_OK = 0
EXIT_ERROR = 1
EXIT_CANNOT_WRITE = 74  # disk full or not writable
EXIT_PARENT_GONE = 99


def rank_file(rank: int) -> str:
    """File name of a rank's record inside the run directory."""
    return f"rank{rank}.json"
