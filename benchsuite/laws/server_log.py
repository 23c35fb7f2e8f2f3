"""Laws of a server's book-keeping: versions, staleness and the tiling identity.

They hold for any policy and any timing, for each server. The identity tiles each worker's way
through the versions 0..T: from a version read to the one just before its push is applied
(staleness), from there to the version of the answer, and from the last answer to T. It is exact, in
integers. It checks the book-keeping; that a gradient belongs to the version it claims is checked by
`replay.py`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import twins
from benchsuite.laws.harness.runs import Change, PushLog, option, run, sync_of
from benchsuite.plan.cell import Cell, global_batch

Read = Callable[[PushLog], PushLog]


def as_written(log: PushLog) -> PushLog:
    """The log as the server wrote it."""
    return log


def tiling(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None, read: Read = as_written
) -> Figure:
    """The steps of every worker through the versions cover 0..T without a gap or an overlap.

    sum of staleness + sum (next read - just before) + sum_i (T - last read_i) = N T - sum_i first
    read_i. A gradient that was given up adds next read - version read on the left. Bound: exact.
    The twins forget reads.
    """
    result = run(make_ranks, cell, change=change)
    residuals = [tiling_residual(read(log)) for log in result.logs]
    return Figure(
        max(map(abs, residuals)), 0, f"left minus right per server: {residuals}, {cell.label}"
    )


def tiling_residual(log: PushLog) -> int:
    """Left minus right side of the identity.

    A push that was never answered ends in the last term, so it does not count.
    """
    answered = [row for row, version in enumerate(log.version_next) if version >= 0]
    stale = sum(log.staleness[row] for row in answered)
    held = sum(log.version_next[row] - log.version_before[row] for row in answered)
    ahead = sum(log.version - last for last in log.last_read)
    return (
        stale
        + held
        + log.abandoned_versions
        + ahead
        - (len(log.last_read) * log.version - sum(log.first_read))
    )


def tiling_at_once(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None, read: Read = as_written
) -> Figure:
    """Where pushes are applied and answered at once, the identity has a shorter form.

    sum of staleness + sum_i (T - last read_i) = T (N - 1). Bound: exact. In the twins staleness is
    counted after the apply, a read is forgotten, or answers are held back.
    """
    result = run(make_ranks, cell, change=change)
    sides = []
    for log in map(read, result.logs):
        left = sum(log.staleness) + sum(log.version - last for last in log.last_read)
        sides.append((left, log.version * (len(log.last_read) - 1)))
    worst = max(abs(left - right) for left, right in sides)
    text = ", ".join(f"{left} = {right}" for left, right in sides)
    return Figure(
        worst, 0, f"sum of staleness + sum (T - last read) = T (N - 1): {text}, {cell.label}"
    )


def versions_are_pushes(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """Every push is one update, with or without a lock.

    Versions, pushes taken, pushes sent and batches of the budget are as many. Bound: exact. In the
    twins every fourth update is lost, or two pushes are one update.
    """
    result = run(make_ranks, cell, change=change)
    sent = sum(result.events["pushes"])
    budget = result.cell.budget.samples or 0
    batches = budget * result.cell.num_workers // global_batch(result.cell)
    numbers = [
        (log.version, len(log.worker), sum(log.replies), sent, batches) for log in result.logs
    ]
    gap = max(max(row) - min(row) for row in numbers)
    overlapped = sum(log.overlapped_replies for log in result.logs)
    return Figure(
        gap,
        0,
        f"versions, pushes, replies, sent, due per server: {numbers}; {overlapped} overlapped, "
        f"{cell.label}",
    )


def histogram_sums_to_updates(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None, read: Read = as_written
) -> Figure:
    """The histogram of staleness has one entry per update, none negative and none of T or more.

    Bound: exact. In the twin every fourth update is lost.
    """
    result = run(make_ranks, cell, change=change)
    gap = 0
    for log in map(read, result.logs):
        histogram = Counter(log.staleness)
        inside = sum(count for stale, count in histogram.items() if 0 <= stale < log.version)
        gap = max(gap, abs(inside - log.version))
    versions = [log.version for log in result.logs]
    return Figure(gap, 0, f"entries missing or outside 0..T-1 of T = {versions}, {cell.label}")


def batches_are_used_once(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """Every shard of every global batch of the budget is pushed once, whoever is fast.

    Bound: exact. The twin pushes twice.
    """
    result = run(make_ranks, cell, change=change)
    due = range(
        (result.cell.budget.samples or 0) * result.cell.num_workers // global_batch(result.cell)
    )
    gap = 0
    for log in result.logs:
        seen = Counter(log.tag)
        gap += sum(abs(seen.get(tag, 0) - (tag in due)) for tag in seen.keys() | set(due))
    return Figure(gap, 0, f"{gap} of {len(due)} batches missing or repeated, {cell.label}")


# -- wrong ways to read a log ----------------------------------------------------------------------


def counted_after_the_apply(log: PushLog) -> PushLog:
    """The log with staleness taken one version too late."""
    return dataclasses.replace(log, version_before=[version + 1 for version in log.version_before])


def reads_forgotten(log: PushLog) -> PushLog:
    """The log of a server that notes a read only at the next push.

    The version read is then that of the push before.
    """
    seen: dict[int, int] = {}
    reads = []
    for worker, read in zip(log.worker, log.version_read, strict=True):
        reads.append(seen.get(worker, 0))
        seen[worker] = read
    return dataclasses.replace(log, version_read=reads)


class _Held(twins.Policy):
    """A server policy that holds each answer until somebody else pushes or says goodbye."""

    _waiting: int | None = None

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        super().on_push(worker, version, flat)
        before = self._waiting
        self._waiting = worker
        return [] if before is None else [before]

    def on_goodbye(self, worker: int) -> list[int]:
        before = self._waiting
        self._waiting = None
        return [] if before is None else [before]


class _Batched(twins.Policy):
    """A server policy in which two pushes are one update."""

    def apply(self, gradient: Tensor, *, num_gradients: int = 1, **where: Any) -> None:
        self._calls += 1
        if self._calls % 2:
            self._kept = gradient.clone()
        else:
            self._apply(gradient.add_(self._kept), num_gradients=2)


def has_server_log(cell: Cell) -> bool:
    """Whether its servers take single pushes, as every strategy on parameter servers does."""
    return cell.num_servers > 0


def is_asynchronous(cell: Cell) -> bool:
    """Whether pushes are applied and answered at once."""
    return sync_of(cell) == "asynchronous"


def has_lock(cell: Cell) -> bool:
    """Whether it is asynchronous under the article's lock."""
    return is_asynchronous(cell) and option(cell, "asynchronous", "lock") == "exclusive"


_ON = {"sync": "asynchronous", "topology": "parameter_server", "servers": 1, "replicas": 3}
_TWO = {**_ON, "replicas": 2}

LAWS = (
    Law(
        "the tiling identity holds for any policy",
        tiling,
        has_server_log,
        (
            Control(
                "staleness read after the apply, answers kept",
                partial(tiling, read=reads_forgotten),
                _ON,
            ),
            Control(
                "a backup-worker log whose reads are forgotten",
                partial(tiling, read=reads_forgotten),
                {**_ON, "sync": "k_sync"},
            ),
        ),
    ),
    Law(
        "sum of staleness + sum (T - last read) = T (N - 1)",
        tiling_at_once,
        has_lock,
        (
            Control(
                "staleness counted after the apply",
                partial(tiling_at_once, read=counted_after_the_apply),
                _ON,
            ),
            Control("a read is forgotten", partial(tiling_at_once, read=reads_forgotten), _ON),
            Control(
                "answers are held back",
                partial(tiling_at_once, change=twins.with_policy(_Held)),
                _TWO,
            ),
        ),
    ),
    Law(
        "versions are pushes",
        versions_are_pushes,
        is_asynchronous,
        (
            Control(
                "every fourth update is lost",
                partial(versions_are_pushes, change=twins.with_policy(twins.Forgetful)),
                _ON,
            ),
            Control(
                "two pushes are one update",
                partial(versions_are_pushes, change=twins.with_policy(_Batched)),
                _ON,
            ),
        ),
    ),
    Law(
        "the histogram of staleness sums to the updates",
        histogram_sums_to_updates,
        has_lock,
        (
            Control(
                "every fourth update is lost",
                partial(histogram_sums_to_updates, change=twins.with_policy(twins.Forgetful)),
                _ON,
            ),
        ),
    ),
    Law(
        "every batch of the budget is used once",
        batches_are_used_once,
        lambda cell: (
            sync_of(cell) in ("asynchronous", "k_sync")
            and option(cell, "k_sync", "late") != "cancel"
        ),
        (
            Control(
                "pushes twice",
                partial(batches_are_used_once, change=twins.with_server(twins.Repeating)),
                _ON,
            ),
        ),
    ),
)
