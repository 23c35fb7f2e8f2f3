"""Laws of hogwild: with its lock it loses nothing, without it makes nothing up.

Under the lock no increment is lost, and one process can make the run again, update by update.
Without it no increment is made up, and the lost share is said. How many are lost is a matter of
luck: it is reported, and never asserted to be more than none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchsuite.comm import Comm
from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import twins
from benchsuite.laws.harness.runs import (
    Change,
    Run,
    both,
    from_zero_with_ones,
    option,
    rebuilt,
    relative,
    run,
    sync_of,
    with_options,
    worst,
)
from benchsuite.laws.harness.serial import Replicas
from benchsuite.laws.synchronous import unclipped
from benchsuite.plan.cell import Cell
from benchsuite.update import Updater
from benchsuite.worker.setup import Training

FLOAT64 = 1e-10


def loses_nothing(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """Under the lock no increment is lost: with gradients of ones the shared vector ends at -U.

    It starts at 0 with learning rate 1, and U is the number of all updates. Bound: exact, while U <
    2^24. The twins do not take the lock, or make every step twice.
    """
    lost, updates = increments_lost(make_ranks, cell, change=change)
    return Figure(abs(lost), 0, f"{lost:g} increments of {updates} lost, {cell.label}")


def makes_nothing_up(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """Without a lock the shared vector never goes beyond -U, where gradients are ones.

    Bound: exact. The twin makes every step twice.
    """
    lost, updates = increments_lost(make_ranks, cell, change=change)
    text = f"{100 * lost / updates:.3g} % of {updates} increments lost without a lock, {cell.label}"
    return Figure(max(0.0, -lost), 0, text)


def increments_lost(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> tuple[float, int]:
    """(increments of an element that were lost, as a mean over the elements; updates made)."""
    cell = with_options(cell, "hogwild", lr_rule="same")
    result = run(make_ranks, cell, change=both(from_zero_with_ones, change))
    updates = sum(result.events["updates"])
    last = torch.stack([worker.params[-1] for worker in result.workers])
    return float((updates + last.min(dim=0).values).mean()), updates


def locked_replay(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """One process makes every version of the shared vector again, in the order of the lock.

    Bound: a relative error of 1e-10. In the twins steps go with lr instead of lr/N, gradients are
    not clipped or one batch late.
    """
    result = run(make_ranks, cell, change=both(_watch, change), after=_turns)
    turns = sorted(
        (turn, rank.rank, step) for rank in result.workers for step, turn in enumerate(rank.after)
    )
    updates = sum(result.events["updates"])
    if len(turns) != updates:
        text = f"the lock was taken {len(turns)} times for {updates} updates, {cell.label}"
        return Figure(float("nan"), FLOAT64, text)
    versions = _versions(result, [(worker, step) for _, worker, step in turns])
    value, where = worst(
        [
            (
                relative(result.workers[worker].params[step + 1] - theirs, theirs),
                f"update {turn} by worker {worker}",
            )
            for (turn, worker, step), theirs in zip(turns, versions, strict=True)
        ]
    )
    return Figure(
        value, FLOAT64, f"||difference|| / ||parameters||, {where} of {updates}, {cell.label}"
    )


def _versions(result: Run, order: list[tuple[int, int]]) -> list[Tensor]:
    """The vector after each update of (worker, its how-many-eth).

    Each gradient is computed on what that worker read after its update before.
    """
    replicas = Replicas(result.cell)
    whole = replicas.recipe
    size = replicas.num_workers
    if option(result.cell, "hogwild", "lr_rule") == "equal_sample":
        replicas.recipe = dataclasses.replace(whole, lr=lambda progress: whole.lr(progress) / size)
    shared = replicas.params[0]
    read = replicas.record()
    replicas.params = [shared] * size
    replicas.fresh_optimizers()  # one optimiser per worker, all of them on the one vector
    versions = []
    for worker, step in order:
        index, shard, _ = result.workers[worker].work[step]
        gradient = replicas.clip(replicas.gradient(shard, index, read[worker]))
        replicas.update(worker, gradient, index)
        read[worker] = shared.clone()
        versions.append(read[worker])
    return versions


class _Numbered:
    """A lock that numbers its turns over all ranks."""

    def __init__(self, lock: AbstractContextManager[Any], comm: Comm, turns: list[int]) -> None:
        self._lock = lock
        self._comm = comm
        self._turns = turns

    def __enter__(self) -> None:
        self._lock.__enter__()
        self._turns.append(self._comm.fetch_add("turns of the lock", 1))

    def __exit__(self, *error: Any) -> None:
        self._lock.__exit__(*error)


class _Watched:
    """A comm whose locks number their turns."""

    def __init__(self, whole: Comm) -> None:
        self._whole = whole
        self.turns: list[int] = []  # the numbers of this rank's turns

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def lock(self, name: str) -> _Numbered:
        return _Numbered(self._whole.lock(name), self._whole, self.turns)


def _watch(training: Training) -> Training:
    """The change that lets a rank's locks number their turns."""
    return rebuilt(training, comm=_Watched(training.comm))


def _turns(training: Training) -> list[int]:
    """The numbers of the turns that this rank had."""
    return training.comm.turns  # type: ignore[attr-defined, no-any-return]


class _Torn:
    """An updater that reads, takes a break, and writes what it then makes of what it read."""

    def __init__(self, shared: Tensor) -> None:
        self._shared = shared

    def step(self, grad: Tensor, *, samples: int) -> None:
        read = self._shared.clone()
        time.sleep(0.002)
        self._shared.copy_(read - grad)


class _Twice:
    """An updater that makes every step twice."""

    def __init__(self, updater: Any) -> None:
        self._updater = updater

    def step(self, grad: Tensor, *, samples: int) -> None:
        self._updater.step(grad, samples=samples)
        self._updater.step(grad, samples=samples)


def _twofold(training: Training) -> Training:
    """The change with an updater that makes every step twice."""
    strategy: Any = training.strategy
    strategy._updater = _Twice(strategy._updater)
    return training


def _whole_rate(training: Training) -> Training:
    """The change in which a step on batch/N samples has the learning rate of a whole batch."""
    strategy: Any = training.strategy
    strategy._updater = Updater(strategy._shared, training.recipe)
    return training


def _unguarded(training: Training) -> Training:
    """The change in which the lock is not taken."""
    strategy: Any = training.strategy
    strategy._guard, strategy._updater = contextlib.nullcontext(), _Torn(strategy._shared)
    return training


_ON: Mapping[str, Any] = {
    "sync": "hogwild",
    "topology": "native",
    "replicas": 3,
    "options": {"hogwild": {"lock": "exclusive"}},
}
_CLIPPED: Mapping[str, Any] = {**_ON, "options": {**_ON["options"], "tiny": {"clip_norm": 0.5}}}

LAWS = (
    Law(
        "hogwild under its lock loses no increment",
        loses_nothing,
        lambda cell: sync_of(cell) == "hogwild" and option(cell, "hogwild", "lock") == "exclusive",
        (
            Control(
                "the lock is not taken",
                partial(loses_nothing, change=_unguarded),
                _ON,
                real_ranks=True,
            ),
            Control("every step is made twice", partial(loses_nothing, change=_twofold), _ON),
        ),
        own_run=True,
    ),
    Law(
        "hogwild under its lock replays to the same parameters",
        locked_replay,
        lambda cell: sync_of(cell) == "hogwild" and option(cell, "hogwild", "lock") == "exclusive",
        (
            Control(
                "steps go with lr instead of lr/N", partial(locked_replay, change=_whole_rate), _ON
            ),
            Control(
                "gradients are not clipped", partial(locked_replay, change=unclipped), _CLIPPED
            ),
            Control(
                "gradients are one batch late",
                partial(locked_replay, change=twins.late_gradient),
                _ON,
            ),
        ),
    ),
    Law(
        "hogwild without a lock makes no increment up",
        makes_nothing_up,
        lambda cell: sync_of(cell) == "hogwild" and option(cell, "hogwild", "lock") == "none",
        (Control("every step is made twice", partial(makes_nothing_up, change=_twofold), _ON),),
        own_run=True,
    ),
)
