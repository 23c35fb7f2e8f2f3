"""Policy lag of agents and the learner's queue.

Imports no torch.

Policy lag: version at the apply minus version that the rollout was collected with. A rollout is
trained on in several steps, and the policy moves on at each: synchronous PPO has lags of 0 to 15.
Of a server's pushes both versions stand in its log. A replica that steps itself counts its own
versions; where all share their parameters the batches handed out in between are the versions.
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchsuite.plan import declared
from benchsuite.plan.cell import Cell

Rank = Mapping[str, Any]


def section(
    cell: Cell, workers: Sequence[Rank], server: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`policy_lag` {mean, max, histogram}, null where nothing was applied; {} where nobody acts."""
    per_rollout = workers[0].get("per_rollout", 0)
    if not per_rollout:
        return {}

    if workers[0]["snapshot_of"] == "servers":
        lags = [] if server is None else list(_of_pushes(workers, server["log"], per_rollout))
    else:
        lags = [lag for worker in workers for lag in _of_steps(cell, worker, per_rollout)]

    return {"policy_lag": summary(lags)}


def summary(values: Sequence[int]) -> dict[str, Any] | None:
    """Mean, largest and histogram of whole numbers."""
    if not values:
        return None

    histogram: dict[str, int] = {}
    for value in sorted(values):
        histogram[str(value)] = histogram.get(str(value), 0) + 1
    return {"histogram": histogram, "mean": statistics.fmean(values), "max": max(values)}


def queue(sent_ns: Sequence[int], taken_ns: Sequence[int]) -> list[int]:
    """How many pushes had been sent and not been taken when each was taken, itself included.

    One clock for all.
    """
    sent = sorted(sent_ns)
    return [bisect.bisect_right(sent, at) - before for before, at in enumerate(taken_ns)]


def extent(lengths: Sequence[int]) -> dict[str, Any] | None:
    """Mean and largest."""
    return {"mean": statistics.fmean(lengths), "max": max(lengths)} if lengths else None


def _of_pushes(
    workers: Sequence[Rank], log: Mapping[str, Sequence[int]], per_rollout: int
) -> Iterable[int]:
    """By the order of the worker's own steps: a gradient that was given up left no push."""
    position = {
        (worker["rank"], tag): at
        for worker in workers
        for at, tag in enumerate(worker["steps"]["index"])
    }
    collected: dict[tuple[int, int], int] = {}  # worker, rollout -> version
    taken: dict[int, int] = {}

    for worker, tag, read, before in zip(
        log["worker"], log["tag"], log["version_read"], log["version_before"], strict=True
    ):
        # A lost worker's steps are not known.
        at = position.get((worker, tag), taken.get(worker, 0))
        taken[worker] = at + 1
        yield before - collected.setdefault((worker, at // per_rollout), read)


def _of_steps(cell: Cell, worker: Rank, per_rollout: int) -> Iterable[int]:
    steps = worker["steps"]
    count = sum(1 for samples in steps["samples"] if samples)

    if worker["apart"] and worker["snapshot_of"] == "replica":
        index = steps["index"]
        return [index[at] - index[at - at % per_rollout] for at in range(count)]

    says = declared.where_known("sync", cell.sync)
    late = isinstance(says, declared.Strategy) and says.lag_by_one
    return [at % per_rollout + (late and at >= per_rollout) for at in range(count)]
