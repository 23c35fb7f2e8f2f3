"""Laws of actors and a learner.

From the learner's log alone one process plays the run again, the books balance, and trajectories
have the bytes that are predicted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchsuite import rules
from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases
from benchsuite.laws.harness.runs import (
    Change,
    PushLog,
    Run,
    option,
    relative,
    run,
    sync_of,
    with_options,
    worst,
)
from benchsuite.laws.harness.twins import late_gradient
from benchsuite.laws.server_log import Read, as_written, reads_forgotten, tiling_residual
from benchsuite.laws.topology import compare
from benchsuite.laws.traffic import described
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.worker import predict, setup
from benchsuite.worker.setup import Training
from benchsuite.workload import seeded_layers

FLOAT64 = 1e-10
LENGTH = 4  # batches per trajectory
VARIANTS: tuple[dict[str, int], ...] = tuple(
    {"ahead": ahead, "steps_per_trajectory": steps}
    for ahead, steps in ((0, 1), (0, 2), (1, 2), (2, 1), (1, 3))
)


def log_replay(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None, read: Read = as_written
) -> Figure:
    """From the learner's log alone one process computes every version of its parameters again.

    The trajectories of each actor are played again with the versions that the log names and learned
    from in the log's order. Bound: a relative error of 1e-10 in float64. The twins miscount the
    version read, lose the answers, hand gradients over late, or leave V-trace out.
    """
    result = run(make_ranks, cell, change=change)
    steps = int(option(result.cell, "actor_learner", "steps_per_trajectory"))
    mine = result.servers[0].params
    theirs = replayed(result, read(result.logs[0]))[::steps]
    if len(mine) != len(theirs):
        return Figure(
            float("nan"),
            FLOAT64,
            f"{len(mine)} versions, {len(theirs)} replayed, {result.cell.label}",
        )
    value, where = worst(
        [
            (relative(own - again, again), f"version {number}")
            for number, (own, again) in enumerate(zip(mine, theirs, strict=True))
        ]
    )
    stale = sum(result.logs[0].staleness)
    return Figure(
        value,
        FLOAT64,
        f"||difference|| / ||parameters||, {where}, lag {stale} in all, {result.cell.label}",
    )


def replayed(result: Run, log: PushLog) -> list[Tensor]:
    """The learner's parameters at the start and after every step.

    A read of a version that cannot have been there ends the list.
    """
    cell = result.cell
    dtype = setup.DTYPES[cell.precision]
    count = cell.replicas
    workload: Any = setup.start_workload(cell)
    recipe = setup.make_recipe(cell, workload)
    model = nn.Sequential(*seeded_layers(workload, cell.seed)).to(dtype)
    params = list(model.parameters())
    optimizer = recipe.make_optimizer(params)
    length, steps = (
        int(option(cell, "actor_learner", f"{name}_per_trajectory"))
        for name in ("batches", "steps")
    )
    actors = [workload.environments(shard=actor, num_shards=count) for actor in range(count)]
    played = [0] * count
    versions = [nn.utils.parameters_to_vector(params).detach().clone()]
    for row, (actor, version) in enumerate(zip(log.worker, log.version_read, strict=True)):
        if not 0 <= version < len(versions):
            return versions
        nn.utils.vector_to_parameters(
            versions[version].clone(), params
        )  # the optimiser takes the memory as it is
        batch = workload.trajectory(
            torch.no_grad()(model.forward), actors[actor], played[actor], length
        )
        played[actor] += 1
        nn.utils.vector_to_parameters(versions[-1].clone(), params)
        samples = int(row * recipe.global_batch * length / count)
        for _ in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr(min(samples / recipe.budget, 1.0))
            optimizer.zero_grad()
            workload.loss(model(batch.x), batch).backward()
            if recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(params, recipe.clip_norm)
            optimizer.step()
            versions.append(nn.utils.parameters_to_vector(params).detach().clone())
    return versions


def books_balance(make_ranks: MakeRanks, cell: Cell, *, read: Read = as_written) -> Figure:
    """The tiling identity of server logs holds, and the run used its budget.

    There are as many steps as versions, and as many trajectories as the budget allows. Bound:
    exact. The twin miscounts the version read.
    """
    result = run(make_ranks, cell)
    log = read(result.logs[0])
    residual = tiling_residual(log)
    length, steps = (
        option(result.cell, "actor_learner", f"{name}_per_trajectory")
        for name in ("batches", "steps")
    )
    recipe = setup.make_recipe(result.cell, setup.make_workload(result.cell))
    due = recipe.budget // recipe.global_batch * result.cell.replicas // length
    value = abs(residual) + abs(log.version - steps * len(log.worker)) + abs(len(log.worker) - due)
    return Figure(
        value,
        0,
        f"tiling: left minus right {residual}; {log.version} versions, {len(log.worker)} "
        f"trajectories of {due}",
    )


def bytes_are_predicted(make_ranks: MakeRanks, cell: Cell, *, length: int = LENGTH) -> Figure:
    """On every edge, over the whole run, bytes and messages are the predicted ones.

    `length` is that of the trajectories which the prediction speaks of. Bound: exact. The twin
    predicts trajectories that are twice as long.
    """
    result = run(make_ranks, cell)
    told = with_options(result.cell, "actor_learner", batches_per_trajectory=length)
    strategy, setting = described(told)
    predicted = predict.of_run(told, strategy, result.workers[0].shapes, result.events, setting)
    return compare(result.traffic, predicted, result.cell)


# -- twins -----------------------------------------------------------------------------------------


def deaf(training: Training) -> Training:
    """The change with actors that note the version of an answer but act with what they had."""
    strategy = training.strategy
    kept = training.part.params.clone()
    whole: Callable[[int], None] = strategy._wait  # type: ignore[attr-defined]

    def wait(most: int) -> None:
        whole(most)
        training.part.params.copy_(kept)

    if not training.is_server:
        strategy._wait = wait  # type: ignore[attr-defined]
    return training


def uncorrected(training: Training) -> Training:
    """The change with a learner that takes all trajectories for its own: its ratios are 1."""
    if training.is_server:
        part: Any = training.part
        workload = part._workload
        whole = workload.loss

        def loss(output: Tensor, batch: Any) -> Tensor:
            count, steps = batch.y.shape[:2]
            logs = output.detach()[:, :-1].log_softmax(-1).view(count, steps + 1, -1)[:, :-1]
            y = batch.y.clone()
            y[..., 1] = logs.gather(-1, y[..., 0].long().unsqueeze(-1)).squeeze(-1)
            made: Tensor = whole(output, dataclasses.replace(batch, y=y))
            return made

        workload.loss = loss
    return training


# -- cells -----------------------------------------------------------------------------------------


def _cells(asked: cases.Asked) -> Sequence[Cell]:
    """The agent's cells, for every number of workers that divides its environments."""
    if not asked.includes(sync="actor_learner", topology="parameter_server", compression="none"):
        return []
    made = [
        resolve(
            Cell(
                **{
                    **_ON,
                    "replicas": n,
                    "clock": asked.clock,
                    "options": {"actor_learner": options},
                }
            )
        )
        for n in asked.workers
        for options in ({**variant, "batches_per_trajectory": LENGTH} for variant in VARIANTS)
    ]
    return [cell for cell in made if not rules.validate(cell)]


_ON: dict[str, Any] = {
    "workload": "rl_agent",
    "preset": "smoke",
    "sync": "actor_learner",
    "topology": "parameter_server",
    "replicas": 2,
    "servers": 1,
    "precision": "fp64",
    "budget": Budget(steps=32),
    "sources": {},
    "options": {"actor_learner": {**VARIANTS[2], "batches_per_trajectory": LENGTH}},
}
_STALE = {**_ON, "options": {"actor_learner": {**VARIANTS[-1], "batches_per_trajectory": LENGTH}}}
CELLS = cases.Cells(_cells, cases.subject_of)


def _is_one(cell: Cell) -> bool:
    """Whether the cell's strategy is the actor-learner."""
    return sync_of(cell) == "actor_learner"


LAWS = (
    Law(
        "the learner's log replays to the same parameters",
        log_replay,
        _is_one,
        (
            Control(
                "the version read is miscounted", partial(log_replay, read=reads_forgotten), _ON
            ),
            Control("the answers are lost", partial(log_replay, change=deaf), _ON),
            Control(
                "gradients are one trajectory late", partial(log_replay, change=late_gradient), _ON
            ),
            Control("without V-trace", partial(log_replay, change=uncorrected), _STALE),
        ),
    ),
    Law(
        "a learner's books balance",
        books_balance,
        _is_one,
        (
            Control(
                "the version read is miscounted", partial(books_balance, read=reads_forgotten), _ON
            ),
        ),
    ),
    Law(
        "trajectories and answers have the predicted bytes",
        bytes_are_predicted,
        _is_one,
        (
            Control(
                "of trajectories twice as long",
                partial(bytes_are_predicted, length=2 * LENGTH),
                _ON,
            ),
        ),
    ),
)
