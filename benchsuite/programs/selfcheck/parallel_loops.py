"""Training scripts that divide a replica with the library's own class, as one would write them.

`fsdp_loop` calls `fully_shard` as its documentation shows it, on every layer with parameters and on
the whole. `tensor_loop` calls `parallelize_module` on the matrices of a transformer's blocks.
`pipeline_loop` uses two `PipelineStage`s and `Schedule1F1B`. They are the baselines of `benchsuite
selfcheck --only parallel`; their records are those of `baseline_loops.py`.
"""

from __future__ import annotations

import time
from collections import Counter

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from benchsuite.programs.selfcheck.baseline_loops import begin, end
from benchsuite.worker.job import RankJob
from benchsuite.workload import Batch, seeded_layers


def fsdp_loop(job: RankJob) -> None:
    """Trains with `fully_shard`: zero_grad, forward, backward, clip, step, on DTensors.

    Layers that share a parameter are left to the `fully_shard` of the whole model.
    """
    workload, recipe, steps = begin(job)
    rank = job.rank
    size = job.world_size
    batch_size = recipe.global_batch
    budget = recipe.budget
    model = nn.Sequential(*seeded_layers(workload, job.cell["seed"]))
    users = Counter(parameter for layer in model for parameter in layer.parameters())

    for layer in model:
        if any(True for _ in layer.parameters()) and all(users[p] == 1 for p in layer.parameters()):
            fully_shard(layer)

    fully_shard(model)
    parameters = list(model.parameters())
    optimizer = recipe.make_optimizer(parameters)
    stamps = [0] * (steps + 1)
    losses = [0.0] * steps

    dist.barrier()
    cpu_s = -time.process_time()
    stamps[0] = time.perf_counter_ns()

    for step in range(steps):
        batch = workload.batch(step, shard=rank, num_shards=size)
        optimizer.zero_grad()
        loss = workload.loss(model(batch.x), batch)
        loss.backward()
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
        optimizer.param_groups[0]["lr"] = recipe.lr(step * batch_size / budget)
        optimizer.step()
        losses[step] = float(loss.detach())
        stamps[step + 1] = time.perf_counter_ns()

    cpu_s += time.process_time()
    common = torch.tensor(losses)
    # The mean loss of all shares, as in the suite: what is compared must have done the same work.
    dist.all_reduce(common)
    end(job, stamps, (common / size).tolist(), cpu_s)


def tensor_loop(job: RankJob) -> None:
    """Trains a transformer with `parallelize_module`: zero_grad, forward, backward, clip, step.

    Plain and split parameters are clipped by the norm of both together. They are two groups,
    because torch's loops over many tensors refuse lists that mix DTensors with plain tensors.
    """
    workload, recipe, steps = begin(job)
    batch_size = recipe.global_batch
    budget = recipe.budget
    model = nn.Sequential(*seeded_layers(workload, job.cell["seed"]))
    mesh = init_device_mesh("cpu", (job.world_size,))

    for block in list(model)[1:-1]:
        parallelize_module(
            block,
            mesh,
            {
                "qkv": ColwiseParallel(),
                "out": RowwiseParallel(),
                "up": ColwiseParallel(),
                "down": RowwiseParallel(),
            },
        )

    groups = [
        [p for p in model.parameters() if isinstance(p, DTensor) is split]
        for split in (True, False)
    ]
    optimizer = recipe.make_optimizer([{"params": group} for group in groups])
    stamps = [0] * (steps + 1)
    losses = [0.0] * steps

    dist.barrier()
    cpu_s = -time.process_time()
    stamps[0] = time.perf_counter_ns()

    for step in range(steps):
        batch = workload.batch(step, shard=0, num_shards=1)
        optimizer.zero_grad()
        loss = workload.loss(model(batch.x), batch)
        loss.backward()

        if recipe.clip_norm is not None:
            grads = [[p.grad for p in group if p.grad is not None] for group in groups]
            split, plain = (nn.utils.get_total_norm(each) for each in grads)
            assert isinstance(split, DTensor)
            norm = float(torch.hypot(split.full_tensor(), plain))
            for each in grads:
                torch._foreach_mul_(each, min(1.0, recipe.clip_norm / (norm + 1e-6)))

        for group in optimizer.param_groups:
            group["lr"] = recipe.lr(step * batch_size / budget)
        optimizer.step()
        losses[step] = float(loss.detach())
        stamps[step + 1] = time.perf_counter_ns()

    end(job, stamps, losses, cpu_s + time.process_time())


def pipeline_loop(job: RankJob) -> None:
    """Trains with `Schedule1F1B`: zero_grad, a step of the schedule, tied gradients, clip, step.

    The chain is cut at half of its operations.
    """
    workload, recipe, steps = begin(job)
    rank = job.rank
    size = job.world_size
    batch_size = recipe.global_batch
    budget = recipe.budget
    micro_batches = int(job.cell["options"]["pipeline"]["num_micro_batches"])
    chain = seeded_layers(workload, job.cell["seed"])
    cost = torch.tensor(workload.layer_flops()).cumsum(0)
    cut = 1 + int((cost - cost[-1] / 2).abs().argmin())
    model = nn.Sequential(*(chain[cut:] if rank else chain[:cut]))
    parameters = list(model.parameters())
    others = nn.Sequential(*(chain[:cut] if rank else chain[cut:])).parameters()
    elsewhere = {id(parameter) for parameter in others}
    tied = [parameter for parameter in parameters if id(parameter) in elsewhere]
    stage = PipelineStage(model, rank, size, torch.device("cpu"))

    def loss_of(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return workload.loss(output, Batch(None, y, len(y)))

    schedule = Schedule1F1B(stage, micro_batches, loss_of)
    optimizer = recipe.make_optimizer(parameters)
    stamps = [0] * (steps + 1)
    losses = [0.0] * steps

    dist.barrier()
    cpu_s = -time.process_time()
    stamps[0] = time.perf_counter_ns()
    for step in range(steps):
        batch = workload.batch(step, shard=0, num_shards=1)
        optimizer.zero_grad()
        each: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(batch.x)
        else:
            schedule.step(target=batch.y, losses=each)
        for parameter in tied:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
        if recipe.clip_norm is not None:
            counted = [p for p in parameters if rank == 0 or id(p) not in elsewhere]
            square = nn.utils.get_total_norm(
                [p.grad for p in counted if p.grad is not None]
            ).square()
            dist.all_reduce(square)
            nn.utils.clip_grads_with_norm_(parameters, recipe.clip_norm, square.sqrt())
        optimizer.param_groups[0]["lr"] = recipe.lr(step * batch_size / budget)
        optimizer.step()
        losses[step] = float(torch.stack(each).mean()) if each else 0.0
        stamps[step + 1] = time.perf_counter_ns()
    cpu_s += time.process_time()
    common = torch.tensor(losses)
    # The losses of the last stage: what is compared must have done the same work.
    dist.broadcast(common, size - 1)
    end(job, stamps, common.tolist(), cpu_s)
