"""Laws of synchronous training: it is one process on the concatenated batch.

They speak about `synchronous` on every topology, `ddp`, and `k_sync` without backup workers,
whatever travels how.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import twins
from benchsuite.laws.harness.reference import one_process
from benchsuite.laws.harness.runs import (
    Change,
    GivenGradient,
    both,
    count_different,
    option,
    rebuilt,
    recipe_of,
    relative,
    run,
    sync_of,
    worst,
)
from benchsuite.plan import plugins
from benchsuite.plan.cell import Budget, Cell
from benchsuite.worker.setup import Training

FLOAT64 = 1e-10
FLOAT32 = 1e-6  # for plain SGD over 10 steps; with AdamW, correct float32 code drifts by 1e-4


def is_synchronous(cell: Cell) -> bool:
    """Whether every update is the mean over all workers of one version."""
    all_of_them = option(cell, "k_sync", "backup_workers") == 0 and not option(
        cell, "k_sync", "batch"
    )
    slack, apply = (option(cell, "stale_synchronous", name) for name in ("slack", "apply"))
    in_step = slack == 0 and apply == "per_clock"
    every_step = sync_of(cell) != "ddp" or option(cell, "ddp", "local_steps") in (None, 1)
    return (sync_of(cell) in ("synchronous", "ddp") and every_step) or all_of_them or in_step


def is_exact(cell: Cell) -> bool:
    """Whether the cell is synchronous, and nothing is lost on the way."""
    return is_synchronous(cell) and cell.compression == "none"


def steps_at_once(cell: Cell) -> bool:
    """Whether a lone worker's step is the recipe's optimiser on its newest gradient, no more."""
    plain = plugins.find("sync", cell.sync).constants.get("alone_is_plain", True)
    return (
        bool(plain)
        and cell.compression == "none"
        and option(cell, "local_sgd", "momentum") != "reset"
    )


def equals_one_process(
    make_ranks: MakeRanks,
    cell: Cell,
    *,
    change: Change | None = None,
    clip_norm: float | None = None,
    strict: str = "",
) -> Figure:
    """Every worker's parameters after every step are those of one process on the whole batch.

    `clip_norm` clips both, where the recipe does not. Bound: a relative error of 1e-10 in float64
    and 1e-6 in float32. Among the twins the division by N is missing, nothing is synchronised, an
    answer or a backup worker's gradient is dropped, or each replica's gradient is clipped instead
    of the mean.
    """
    clipped = None if clip_norm is None else partial(with_clip_norm, clip_norm=clip_norm)
    result = run(make_ranks, cell, change=both(clipped, change), strict=strict)
    reference = one_process(result.cell, clip_norm=clip_norm)
    value, where = worst(
        [
            (relative(mine - theirs, theirs), f"worker {worker.rank} after step {step}")
            for worker in result.workers
            for step, (mine, theirs) in enumerate(zip(worker.params, reference, strict=True))
        ]
    )
    steps = len(reference) - 1
    bound = FLOAT64 if result.cell.precision == "fp64" else FLOAT32
    return Figure(
        value,
        bound,
        f"||difference|| / ||parameters||, largest of {steps} steps: {where}, {cell.label}",
    )


def replicas_agree(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None, strict: str = ""
) -> Figure:
    """After every step all workers hold the same bits.

    Bound: exact. The twins synchronise nothing, leave one element unreduced, or let one worker drop
    the answer.
    """
    result = run(make_ranks, cell, change=change, strict=strict)
    first = result.workers[0].params
    different = sum(
        count_different(mine, theirs)
        for worker in result.workers[1:]
        for mine, theirs in zip(worker.params, first, strict=True)
    )
    elements = first[0].numel() * len(first) * (len(result.workers) - 1)
    return Figure(
        different, 0, f"{different} of {elements} elements differ from worker 0's, {cell.label}"
    )


def alone_is_the_plain_loop(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """One worker is bit for bit the plain training loop.

    Clipped cells are left out, because torch takes a norm of norms, which rounds differently.
    Bound: exact. The twins round once more, or drop the answer.
    """
    result = run(make_ranks, cell, change=change)
    reference = one_process(result.cell)
    different = sum(
        count_different(a, b) for a, b in zip(result.workers[0].params, reference, strict=True)
    )
    elements = reference[0].numel() * len(reference)
    return Figure(
        different, 0, f"{different} of {elements} elements differ from the plain loop, {cell.label}"
    )


def integers_are_exact(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """Integer gradients give the bits of the serial sum, so all topologies give the same bits.

    They are float32, added first and divided once. Bound: exact. The twins divide before they add,
    leave one element unreduced, or do not divide on the server.
    """
    cell = dataclasses.replace(cell, precision="fp32")
    result = run(make_ranks, cell, change=both(with_integer_gradients, change))
    num_workers = result.cell.num_workers
    recipe = recipe_of(result.cell)
    flat = result.workers[0].params[0].clone()
    optimizer = recipe.make_optimizer([flat])
    different = 0
    for step in range(recipe.budget // recipe.global_batch):
        total = torch.zeros_like(flat)
        for worker in range(num_workers):
            total += integers(worker, step, flat.numel())
        flat.grad = total / num_workers
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr(step * recipe.global_batch / recipe.budget)
        optimizer.step()
        different += sum(
            count_different(worker.params[step + 1], flat) for worker in result.workers
        )
    return Figure(different, 0, f"{different} elements differ from the serial sum, {cell.label}")


def integers(worker: int, step: int, numel: int) -> Tensor:
    """Small integers, others for every worker and step."""
    generator = torch.Generator().manual_seed(1000 * step + worker)
    return torch.randint(-50, 51, (numel,), generator=generator).float()


def with_integer_gradients(training: Training) -> Training:
    """The change that gives every worker integers as gradients, unclipped."""
    rank = training.comm.rank

    def fill(grad: Tensor, step: int) -> None:
        grad.copy_(integers(rank, step, grad.numel()))

    recipe = dataclasses.replace(training.recipe, clip_norm=None)
    return rebuilt(training, part=GivenGradient(training.part, fill), recipe=recipe)


def with_clip_norm(training: Training, *, clip_norm: float | None) -> Training:
    """The change that clips at this norm (None: not at all), whatever the recipe says."""
    return rebuilt(training, recipe=dataclasses.replace(training.recipe, clip_norm=clip_norm))


unclipped: Change = partial(with_clip_norm, clip_norm=None)


def _on(change: Change, law: Any, broken: str, **on: Any) -> Control:
    """A twin that makes this change to a cell with these fields."""
    return Control(broken, partial(law, change=change), on)


_RING: Mapping[str, Any] = {"sync": "synchronous", "topology": "ring", "replicas": 3}
_DDP: Mapping[str, Any] = {
    "sync": "ddp",
    "topology": "native",
    "replicas": 2,
    "budget": Budget(timeout_s=60.0),
}
_SERVER: Mapping[str, Any] = {
    "sync": "synchronous",
    "topology": "parameter_server",
    "servers": 1,
    "replicas": 3,
}


def _backup(make_ranks: MakeRanks, cell: Cell) -> Figure:
    """The relative error with a server that does not wait for the last worker's gradient."""
    result = run(make_ranks, cell)
    reference = one_process(result.cell)
    last = torch.cat([server.params[-1] for server in result.servers])
    return Figure(relative(last - reference[-1], reference[-1]), FLOAT64, "with one backup worker")


LAWS = (
    Law(
        "synchronous training equals one process on the whole batch",
        equals_one_process,
        is_exact,
        (
            _on(
                twins.with_mean(twins.sum_only),
                equals_one_process,
                "the divide by N is missing",
                **_RING,
            ),
            _on(
                twins.with_mean(twins.silent),
                equals_one_process,
                "nothing is synchronised",
                **_RING,
            ),
            _on(
                twins.without_wrapper,
                equals_one_process,
                "DistributedDataParallel is missing",
                **_DDP,
            ),
            _on(
                twins.with_mean(twins.chunk_skipped),
                equals_one_process,
                "one element is not reduced",
                **_RING,
            ),
            _on(
                twins.with_policy(twins.Undivided),
                equals_one_process,
                "the server does not divide",
                **_SERVER,
            ),
            _on(
                twins.with_policy(twins.Early),
                equals_one_process,
                "applied before all pushes are in",
                **_SERVER,
            ),
            _on(
                twins.with_server(twins.Deaf),
                equals_one_process,
                "the answer is dropped",
                **_SERVER,
            ),
            Control(
                "a backup worker's gradient is dropped",
                _backup,
                {**_SERVER, "sync": "k_sync", "options": {"k_sync": {"backup_workers": 1}}},
            ),
            Control(
                "each replica's gradient is clipped instead of the mean",
                partial(equals_one_process, change=twins.clips_each, clip_norm=0.5),
                _RING,
            ),
        ),
    ),
    Law(
        "replicas hold the same bits after every step",
        replicas_agree,
        lambda cell: is_synchronous(cell) and cell.replicas > 1,
        (
            _on(twins.with_mean(twins.silent), replicas_agree, "nothing is synchronised", **_RING),
            _on(
                twins.without_wrapper, replicas_agree, "DistributedDataParallel is missing", **_DDP
            ),
            _on(
                twins.with_mean(twins.chunk_skipped),
                replicas_agree,
                "one element is not reduced",
                **_RING,
            ),
            _on(
                twins.with_server(twins.Deaf, from_rank=2),
                replicas_agree,
                "one worker drops the answer",
                **_SERVER,
            ),
        ),
    ),
    Law(
        "one worker is bit for bit the plain loop",
        alone_is_the_plain_loop,
        lambda cell: (
            cell.replicas == 1 and recipe_of(cell).clip_norm is None and steps_at_once(cell)
        ),
        (
            Control(
                "a mean that rounds once more",
                partial(alone_is_the_plain_loop, change=twins.with_mean(twins.detour)),
                {**_RING, "replicas": 1},
            ),
            _on(
                twins.with_server(twins.Deaf),
                alone_is_the_plain_loop,
                "the answer is dropped",
                **{**_SERVER, "replicas": 1},
            ),
            _on(
                twins.with_server(twins.Deaf),
                alone_is_the_plain_loop,
                "the answer is dropped, asynchronous",
                **{**_SERVER, "replicas": 1, "sync": "asynchronous"},
            ),
        ),
    ),
    Law(
        "integer gradients give the bits of the serial sum on every topology",
        integers_are_exact,
        lambda cell: is_exact(cell) and sync_of(cell) != "ddp",
        (
            _on(
                twins.with_mean(twins.divided_first),
                integers_are_exact,
                "divides before it adds",
                **_RING,
            ),
            _on(
                twins.with_mean(twins.chunk_skipped),
                integers_are_exact,
                "one element is not reduced",
                **_RING,
            ),
            _on(
                twins.with_policy(twins.Undivided),
                integers_are_exact,
                "the server does not divide",
                **_SERVER,
            ),
        ),
        own_run=True,
    ),
)
