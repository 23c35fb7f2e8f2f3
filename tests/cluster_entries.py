"""What the ranks of tests/test_cluster_*.py do: no training, only what can go wrong."""

from __future__ import annotations

import json
import resource
import sys
import time
from datetime import timedelta
from typing import Any

from benchsuite.measure.beat import Beat, Phase
from benchsuite.measure.faults import open_beat
from benchsuite.worker.job import RankJob, write_rank_file


def trivial(job: RankJob) -> None:
    """Writes its record."""
    open_beat(job.beat_path, rank=job.rank, faults=job.cell["faults"]).enter(Phase.WRITE, 0)
    write_rank_file(
        job.run_dir, job.rank, json.dumps({"rank": job.rank, "private": job.private_network})
    )


def connected(job: RankJob) -> None:
    """Steps of compute, send, receive and barrier over gloo; the last ranks serve where the cell
    has servers."""
    import torch.distributed as dist

    beat = open_beat(job.beat_path, rank=job.rank, faults=job.cell["faults"])
    timeout = timedelta(seconds=job.timeout_s + 5)
    store: Any = dist.TCPStore(
        job.store_host,
        job.store_port,
        job.world_size,
        is_master=job.rank == 0 and not job.store_is_hosted,
        timeout=timeout,
        master_listen_fd=job.store_listen_fd,
        wait_for_workers=False,
    )
    if job.store_prefix:
        store = dist.PrefixStore(job.store_prefix, store)
    dist.init_process_group(
        "gloo", store=store, rank=job.rank, world_size=job.world_size, timeout=timeout
    )
    servers = job.cell["servers"] or 0
    steps = job.cell["budget"]["steps"] or 20
    if job.rank >= job.world_size - servers:
        _serve(beat, steps, job.world_size - servers)
    else:
        _work(beat, steps, job.world_size - 1 if servers else None)
    beat.enter(Phase.WRITE, steps)
    write_rank_file(job.run_dir, job.rank, json.dumps({"rank": job.rank}))
    dist.barrier()


def _work(beat: Beat, steps: int, server: int | None) -> None:
    import torch
    import torch.distributed as dist

    x = torch.zeros(100_000)
    for step in range(steps):
        beat.enter(Phase.COMPUTE, step)
        time.sleep(0.001)
        beat.enter(Phase.SEND, step)
        if server is None:
            dist.all_reduce(x)
            beat.enter(Phase.BARRIER, step)
            dist.barrier()
        else:
            dist.send(x, server)
            beat.enter(Phase.RECV, step)
            dist.recv(x, server)
        beat.enter(Phase.UPDATE, step)


def _serve(beat: Beat, steps: int, workers: int) -> None:
    import torch
    import torch.distributed as dist

    x = torch.zeros(100_000)
    for step in range(steps * workers):
        beat.enter(Phase.SERVE, step)
        source = dist.recv(x)
        beat.enter(Phase.UPDATE, step)
        dist.send(x, source)


def survivors(job: RankJob) -> None:
    """Nobody waits for anybody, but the last rank waits for the goodbyes of the others."""
    from pathlib import Path

    beat = open_beat(job.beat_path, rank=job.rank, faults=job.cell["faults"])
    beat.enter(Phase.COMPUTE, 0)
    if job.rank == job.world_size - 1:
        beat.enter(Phase.SERVE, 0)
        while len(list(Path(job.run_dir).glob("goodbye*"))) < job.world_size - 1:
            time.sleep(0.01)
    write_rank_file(job.run_dir, job.rank, "{}")
    if job.rank < job.world_size - 1:
        goodbye(job)


def goodbye(job: RankJob) -> None:
    """Also called for a lost worker."""
    from pathlib import Path

    (Path(job.run_dir) / f"goodbye{job.rank}").touch()


def asleep(job: RankJob) -> None:
    """Stays until it is killed."""
    beat = open_beat(job.beat_path, rank=job.rank, faults=job.cell["faults"])
    beat.enter(Phase.COMPUTE, 0)
    time.sleep(1000)


def full_disk(job: RankJob) -> None:
    """Rank 1 may write 400 bytes per file."""
    if job.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
    write_rank_file(job.run_dir, job.rank, "x" * 1000)


def lingering(job: RankJob) -> None:
    """Hands its record in and does not end."""
    write_rank_file(job.run_dir, job.rank, "{}")
    if job.rank == 1:
        time.sleep(1000)


def first_asleep(job: RankJob) -> None:
    """Sleeps with seed 0, else writes its record."""
    (asleep if job.cell["seed"] == 0 else trivial)(job)


def named(job: RankJob) -> None:
    """The record is the run directory."""
    write_rank_file(job.run_dir, job.rank, job.run_dir)


if __name__ == "__main__":  # what `python -m benchsuite.worker` does under torchrun
    from benchsuite.cluster import rank_supervisor

    sys.exit(rank_supervisor.main(sys.argv[1:]))
