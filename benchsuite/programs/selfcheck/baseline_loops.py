"""Two training scripts as one would write them without the suite: baselines of `selfcheck`.

`flat_loop` keeps one flat gradient and calls the backend's all-reduce, as `synchronous` over
`native` does. `ddp_loop` uses DistributedDataParallel as its documentation shows it, as `ddp` does.

Model, data and recipe are the workload's. The loops themselves use torch only: one time stamp per
step, no heartbeat, no other clock rows, no counting, no snapshots. A rank's record is `{"steps":
{"start_ns", "end_ns", "loss"}, "cpu_s"}`, which is what `selfcheck` reads of a real rank's.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchsuite.plan.cell import from_json
from benchsuite.worker import setup
from benchsuite.worker.job import RankJob, write_rank_file
from benchsuite.workload import Recipe, Workload, seeded_layers


def flat_loop(job: RankJob) -> None:
    """Trains with parameters and gradient as one vector each.

    The gradient is summed over the ranks and then divided.
    """
    workload, recipe, steps = begin(job)
    rank = job.rank
    size = job.world_size
    batch_size = recipe.global_batch
    budget = recipe.budget
    model = nn.Sequential(*seeded_layers(workload, job.cell["seed"]))
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    flat = torch.cat([p.detach().flatten() for p in parameters])  # (P,)
    grad = torch.zeros_like(flat)  # (P,)
    for p, piece in zip(parameters, flat.split(sizes), strict=True):
        p.data = piece.view_as(p)
    pieces = [piece.view_as(p) for p, piece in zip(parameters, grad.split(sizes), strict=True)]
    optimizer = recipe.make_optimizer([flat])
    flat.grad = grad
    stamps = [0] * (steps + 1)
    losses = [0.0] * steps

    dist.barrier()
    cpu_s = -time.process_time()
    stamps[0] = time.perf_counter_ns()

    for step in range(steps):
        batch = workload.batch(step, shard=rank, num_shards=size)
        loss: Tensor = nn.functional.cross_entropy(model(batch.x), batch.y)
        torch._foreach_copy_(pieces, torch.autograd.grad(loss, parameters))

        if size > 1:
            dist.all_reduce(grad)
            grad.div_(size)

        optimizer.param_groups[0]["lr"] = recipe.lr(step * batch_size / budget)
        optimizer.step()
        losses[step] = float(loss.detach())
        stamps[step + 1] = time.perf_counter_ns()

    end(job, stamps, losses, cpu_s + time.process_time())


def ddp_loop(job: RankJob) -> None:
    """Trains with DistributedDataParallel: zero_grad, forward, backward, step."""
    workload, recipe, steps = begin(job)
    rank = job.rank
    size = job.world_size
    batch_size = recipe.global_batch
    budget = recipe.budget
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(*seeded_layers(workload, job.cell["seed"]))
    )
    optimizer = recipe.make_optimizer(model.parameters())
    stamps = [0] * (steps + 1)
    losses = [0.0] * steps

    dist.barrier()
    cpu_s = -time.process_time()
    stamps[0] = time.perf_counter_ns()

    for step in range(steps):
        batch = workload.batch(step, shard=rank, num_shards=size)
        optimizer.zero_grad()
        loss: Tensor = nn.functional.cross_entropy(model(batch.x), batch.y)
        loss.backward()
        optimizer.param_groups[0]["lr"] = recipe.lr(step * batch_size / budget)
        optimizer.step()
        losses[step] = float(loss.detach())
        stamps[step + 1] = time.perf_counter_ns()

    end(job, stamps, losses, cpu_s + time.process_time())


def begin(job: RankJob) -> tuple[Workload, Recipe, int]:
    """Sets threads, process group and data; returns (workload, recipe, steps)."""
    torch.set_num_threads(int(job.cell["threads"]))
    timeout = timedelta(seconds=job.timeout_s)
    store = dist.TCPStore(
        job.store_host,
        job.store_port,
        is_master=job.rank == 0,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=job.store_listen_fd if job.rank == 0 else None,
    )
    dist.init_process_group(
        "gloo", store=store, rank=job.rank, world_size=job.world_size, timeout=timeout
    )
    cell = from_json(job.cell)
    workload = setup.start_workload(cell)
    recipe = setup.make_recipe(cell, workload)
    return workload, recipe, recipe.budget // recipe.global_batch


def end(job: RankJob, stamps: list[int], losses: list[float], cpu_s: float) -> None:
    """Writes the rank's record."""
    steps = {"start_ns": stamps[:-1], "end_ns": stamps[1:], "loss": losses}
    write_rank_file(job.run_dir, job.rank, json.dumps({"steps": steps, "cpu_s": cpu_s}))
    dist.barrier()
