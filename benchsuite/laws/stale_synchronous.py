"""Laws of stale synchronous training: nobody starts more than `slack` steps ahead.

The other laws say what the two ends of slack are. Slack 0 with one step per clock is synchronous
training (`synchronous.py`), and the push log replays (`replay.py`), here with clipped pushes too.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import twins
from benchsuite.laws.harness.runs import (
    Change,
    both,
    count_different,
    option,
    rebuilt,
    recipe_of,
    run,
    sync_of,
    with_options,
)
from benchsuite.laws.replay import push_log_replay
from benchsuite.laws.synchronous import equals_one_process, unclipped
from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell
from benchsuite.update import clip
from benchsuite.worker.setup import Training

# On real ranks the first worker takes so much longer; in virtual time the cell has a straggler.
STRAGGLER_S = 0.01
CLIPS_ALL = 0.5  # below the norm of every gradient of the run


class Watched(twins.Policy):
    """A server policy that counts for itself how far ahead a worker is when it may go on."""

    def __init__(self, whole: Any, *, num_workers: int) -> None:
        super().__init__(whole)
        self.num_workers = num_workers
        self.finished: dict[int, int] = {}
        self.gone: set[int] = set()
        self.gaps: list[int] = []

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        self.finished[worker] = self.finished.get(worker, 0) + 1
        return self._seen(super().on_push(worker, version, flat))

    def on_goodbye(self, worker: int) -> list[int]:
        self.gone.add(worker)
        return self._seen(super().on_goodbye(worker))

    def _seen(self, answers: list[int]) -> list[int]:
        active = [
            self.finished.get(worker, 0)
            for worker in range(self.num_workers)
            if worker not in self.gone
        ]
        for worker in answers:
            self.gaps.append(self.finished[worker] - min(active, default=self.finished[worker]))
        return answers


def start_gap(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """Behind a slow worker, a worker that may start is at most `slack` steps ahead of the slowest.

    Bound: exact. In the twin workers start one step early.
    """
    watch = partial(_watch, slow=cell.clock == "wall" and cell.num_workers > 1)
    result = run(make_ranks, cell, change=both(change, watch), after=_gaps)
    slack = int(option(cell, "stale_synchronous", "slack"))
    largest = max(max(server.after, default=0) for server in result.servers)
    return Figure(
        max(0, largest - slack), 0, f"largest start gap {largest}, slack {slack}, {cell.label}"
    )


def _watch(training: Training, *, slow: bool) -> Training:
    """The change that watches the servers, and slows the first worker down if `slow`."""
    if training.is_server:
        workers = training.topology.num_workers
        training.strategy = twins.OtherPolicy(
            training.strategy, partial(Watched, num_workers=workers)
        )
        return training
    if slow and training.comm.rank == 0:
        return rebuilt(training, part=_Slow(training.part))
    return training


class _Slow:
    """A part whose gradients take longer."""

    def __init__(self, part: Any) -> None:
        self._part = part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def gradient(self, *args: Any) -> Any:
        time.sleep(STRAGGLER_S)
        return self._part.gradient(*args)


def _gaps(training: Training) -> list[int]:
    """The largest lead that this rank's policy saw."""
    return list(training.strategy.made.gaps) if training.is_server else []  # type: ignore[attr-defined]


def unbounded_is_asynchronous(make_ranks: MakeRanks, cell: Cell, *, slack: int = -1) -> Figure:
    """Without a bound, and with one step per push, the versions are those of `asynchronous`.

    Both run under the same times, and are compared while nobody is done. Gradients depend on
    parameters and worker only, since asynchronous workers are handed other batches. Bound: exact.
    The twin has a bound.
    """
    unbounded = _with(cell, "stale_synchronous", {"slack": slack, "apply": "per_push"})
    asynchronous = _with(dataclasses.replace(cell, sync="asynchronous"), "asynchronous", {})
    runs = [run(make_ranks, each, change=_pulled) for each in (unbounded, asynchronous)]
    steps = recipe_of(cell).budget // recipe_of(cell).global_batch
    different = 0
    compared = 0
    for mine, theirs, log, other in zip(
        runs[0].servers, runs[1].servers, runs[0].logs, runs[1].logs, strict=True
    ):
        length = _until_one_is_done(log.worker, steps)
        compared += length
        different += sum(
            a != b for a, b in zip(log.worker[:length], other.worker[:length], strict=True)
        )
        pairs = zip(mine.params[: length + 1], theirs.params[: length + 1], strict=True)
        different += sum(count_different(a, b) for a, b in pairs)
    return Figure(
        different, 0, f"{different} pushes or elements differ in {compared} updates, {cell.label}"
    )


def _until_one_is_done(workers: list[int], steps: int) -> int:
    """How many pushes come before the first worker has made all its steps."""
    counts: dict[int, int] = {}
    for row, worker in enumerate(workers):
        counts[worker] = counts.get(worker, 0) + 1
        if counts[worker] == steps:
            return row
    return len(workers)


def _with(cell: Cell, member: str, values: Mapping[str, Any]) -> Cell:
    """The cell with the options of this member in the place of the strategy's."""
    options = {
        name: given
        for name, given in cell.options.items()
        if name not in ("stale_synchronous", "asynchronous")
    }
    return dataclasses.replace(cell, options={**options, member: values})


class _Pulled:
    """A part that takes the time of the real gradient, and pulls towards a point of its worker."""

    def __init__(self, part: Any, worker: int) -> None:
        self._part = part
        self._point = torch.linspace(
            0.0, 1.0 + worker, part.params.numel(), dtype=part.params.dtype
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def gradient(self, *args: Any) -> Any:
        loss = self._part.gradient(*args)
        torch.sub(self._part.params, self._point, out=self._part.grad)
        return loss


def _pulled(training: Training) -> Training:
    """The change with such a part."""
    if training.is_server:
        return training
    return rebuilt(training, part=_Pulled(training.part, training.comm.rank))


def constant_rate_is_synchronous(make_ranks: MakeRanks, cell: Cell) -> Figure:
    """At a constant learning rate it equals one process on the whole batch.

    Within a clock, a schedule would give each push another rate. The twin has momentum.
    """
    return equals_one_process(
        make_ranks, with_options(cell, plugins.stem(cell.workload), schedule=False)
    )


def clipped_pushes_replay(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """The push log replays where every push is clipped, whole, by its worker.

    In the twins pushes are not clipped, or each server clips its slice.
    """
    clipped = with_options(cell, plugins.stem(cell.workload), clip_norm=CLIPS_ALL)
    return push_log_replay(make_ranks, clipped, change=change)


def is_stale(cell: Cell) -> bool:
    """Whether the laws speak about this cell."""
    return sync_of(cell) == "stale_synchronous"


def _is_plain_per_push(cell: Cell) -> bool:
    """Whether it is plain SGD with slack 0 and one step per push, without clipping."""
    form = (option(cell, "stale_synchronous", "slack"), option(cell, "stale_synchronous", "apply"))
    recipe = (
        recipe_of(cell)
        if is_stale(cell) and form == (0, "per_push") and cell.compression == "none"
        else None
    )
    if recipe is None or recipe.clip_norm is not None:
        return False
    optimizer = recipe.make_optimizer([torch.zeros(1)])
    group = optimizer.param_groups[0]
    return (
        isinstance(optimizer, torch.optim.SGD)
        and not group["momentum"]
        and not group["weight_decay"]
    )


def _clips_slices(training: Training) -> Training:
    """The change in which the servers clip, each its own slice, and no worker does."""
    if training.is_server:
        return twins.with_policy(partial(_ClipsSlice, clip_norm=training.recipe.clip_norm))(
            training
        )
    return unclipped(training)


class _ClipsSlice(twins.Policy):
    """A server policy that clips what it is about to apply."""

    def __init__(self, whole: Any, *, clip_norm: float | None) -> None:
        super().__init__(whole)
        self._clip_norm = clip_norm

    def apply(self, gradient: Tensor, *, num_gradients: int = 1, **where: Any) -> None:
        clip(gradient, self._clip_norm)
        super().apply(gradient, num_gradients=num_gradients, **where)


class _OneMore(twins.Policy):
    """A server policy that lets workers start one step too early."""

    def __init__(self, whole: Any) -> None:
        super().__init__(whole)
        whole._slack += 1


_ON: Mapping[str, Any] = {
    "sync": "stale_synchronous",
    "topology": "parameter_server",
    "servers": 1,
    "replicas": 3,
    "options": {"stale_synchronous": {"slack": 1}},
}
_IN_STEP = {"stale_synchronous": {"slack": 0, "apply": "per_push"}}
_PER_PUSH = {**_ON, "options": {"stale_synchronous": {"slack": 1, "apply": "per_push"}}}


LAWS = (
    Law(
        "no worker starts more than slack steps ahead",
        start_gap,
        lambda cell: is_stale(cell) and option(cell, "stale_synchronous", "slack") >= 0,
        (
            Control(
                "workers start one step early",
                partial(start_gap, change=twins.with_policy(_OneMore)),
                _ON,
            ),
        ),
        own_run=True,
    ),
    Law(
        "without a bound it is asynchronous",
        unbounded_is_asynchronous,
        lambda cell: (
            is_stale(cell)
            and cell.clock == "virtual"
            and cell.num_servers == 1
            and recipe_of(cell).clip_norm is None
            and cell.compression == "none"
        ),
        (
            Control(
                "with a bound it is not",
                partial(unbounded_is_asynchronous, slack=0),
                {**_ON, "clock": "virtual", "straggler": {"0": 5.0}},
            ),
        ),
    ),
    Law(
        "a push is clipped by its worker",
        clipped_pushes_replay,
        lambda cell: (
            is_stale(cell)
            and option(cell, "stale_synchronous", "apply") == "per_push"
            and cell.compression == "none"
        ),
        (
            Control(
                "pushes are not clipped",
                partial(clipped_pushes_replay, change=unclipped),
                _PER_PUSH,
            ),
            Control(
                "each server clips its slice",
                partial(clipped_pushes_replay, change=_clips_slices),
                {**_PER_PUSH, "servers": 2},
            ),
        ),
        own_run=True,
    ),
    Law(
        "slack 0 with lr/N per push is synchronous for plain SGD",
        constant_rate_is_synchronous,
        _is_plain_per_push,
        (
            Control(
                "with momentum it is not",
                constant_rate_is_synchronous,
                {**_ON, "options": {**_IN_STEP, "tiny": {"optimizer": "momentum"}}},
            ),
        ),
    ),
)
