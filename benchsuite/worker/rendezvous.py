"""How the ranks of a run find each other: the store, and the process group over it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchsuite.comm.groups import World
from benchsuite.comm.process import ProcessComm
from benchsuite.plan.cell import Cell
from benchsuite.worker.job import RankJob

# How much longer than the launcher waits a process group waits, so that there is one judge of a
# rank that hangs: the launcher, which can say which rank stopped where.
PROCESS_GROUP_GRACE_S = 5.0


def connect(
    job: RankJob, cell: Cell, store: Any, on_phase: Any, device: torch.device | None = None
) -> ProcessComm:
    """Joins the run's process group and returns the comm of all ranks.

    torch's default group is made too, because DDP and other libraries use it.

    on_phase: told when the comm begins to wait. device: the rank's own; nccl moves its memory, gloo
    the host's.
    """
    timeout_s = job.timeout_s + PROCESS_GROUP_GRACE_S
    dist.init_process_group(
        cell.backend,
        store=dist.PrefixStore("default", store),
        rank=job.rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=timeout_s),
    )

    moved = torch.device("cpu")
    if device is not None and cell.backend == "nccl":
        moved = device
    world = World(
        store,
        lambda: open_client(job),
        backend=cell.backend,
        interface=job.interface,
        timeout_s=timeout_s,
        device=moved,
        staged=device is not None and device.type == "cuda",
    )

    return ProcessComm(
        world,
        rank=job.rank,
        size=job.world_size,
        group=dist.group.WORLD,
        hosts=job.hosts,
        on_phase=on_phase,
    )


def open_store(job: RankJob) -> Any:
    """This rank's client of the run's store.

    Rank 0 hosts the store on the socket that it was handed, unless somebody else (torchrun) does.
    """
    if job.store_is_hosted or job.rank != 0:
        return open_client(job)

    hosted = dist.TCPStore(
        job.store_host,
        job.store_port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=job.timeout_s + PROCESS_GROUP_GRACE_S),
        master_listen_fd=job.store_listen_fd,
    )
    return dist.PrefixStore(f"cell/{job.store_prefix}", hosted)


def open_client(job: RankJob) -> Any:
    """Another client of the run's store, on a connection of its own."""
    timeout = timedelta(seconds=job.timeout_s + PROCESS_GROUP_GRACE_S)
    client = dist.TCPStore(
        job.store_host, job.store_port, is_master=False, wait_for_workers=False, timeout=timeout
    )

    return dist.PrefixStore(f"cell/{job.store_prefix}", client)
