"""Laws of k_sync: a version is made of its first K = N - c gradients.

With `wait` later gradients are dropped and counted. Without backup workers it is synchronous
(`synchronous.py`). Its parameters are checked by `replay.py`, the tiling identity by
`server_log.py`, and what each form costs in time by `virtual_times.py`.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import twins
from benchsuite.laws.harness.runs import Change, PushLog, option, run, sync_of
from benchsuite.laws.server_log import Read, as_written, counted_after_the_apply
from benchsuite.plan.cell import Cell
from benchsuite.sync import Apply


def versions_have_k(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None, read: Read = as_written
) -> Figure:
    """There is an update after every K gradients in time, and not before, until workers leave.

    Every push is in one update or dropped, never both. The K gradients come from different workers
    unless gradients are counted (`batch`). All is read from the log. Bound: exact. The twins end a
    version one gradient early, take late gradients, or miscount the staleness.
    """
    result = run(make_ranks, cell, change=change)
    form = {name: option(result.cell, "k_sync", name) for name in ("wait", "batch")}
    k = result.cell.num_workers - int(option(result.cell, "k_sync", "backup_workers"))
    wrong = [_wrong_groups(read(log), k, **form) for log in result.logs]
    drops = [
        sum(stale > 0 for stale in log.staleness) if form["wait"] else 0 for log in result.logs
    ]
    pushes = [len(log.worker) for log in result.logs]
    versions = [log.version for log in result.logs]
    return Figure(
        sum(wrong),
        0,
        f"{wrong} versions without K = {k}; {pushes} pushes, {drops} dropped, {versions} updates, "
        f"{cell.label}",
    )


def _wrong_groups(log: PushLog, k: int, *, wait: bool, batch: bool) -> int:
    """How many versions are not made of K gradients (of K workers).

    The last N - 1 may have fewer, because workers leave.
    """
    num_workers = len(log.last_read)
    groups: dict[int, list[int]] = {version: [] for version in range(log.version)}
    wrong = 0
    for worker, before, stale in zip(log.worker, log.version_before, log.staleness, strict=True):
        late = wait and stale > 0
        if stale < 0 or (not late and before not in groups):
            wrong += 1
        elif not late:
            groups[before].append(worker)
    for version, workers in groups.items():
        whole = len(workers) == k or (0 < len(workers) < k and version > log.version - num_workers)
        wrong += not (whole and (batch or len(set(workers)) == len(workers)))
    return wrong


class _Impatient(twins.Policy):
    """A server policy that takes one gradient less than K per version."""

    def start(self, shard: Tensor, apply: Apply) -> None:
        self._whole._k -= 1
        super().start(shard, apply)


class _Hospitable(twins.Policy):
    """A server policy that takes late gradients as if they were in time."""

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        return super().on_push(worker, self._whole._version, flat)


_ON = {"sync": "k_sync", "topology": "parameter_server", "servers": 1, "replicas": 4}

LAWS = (
    Law(
        "a version is its first K gradients",
        versions_have_k,
        lambda cell: sync_of(cell) == "k_sync",
        (
            Control(
                "a version ends one gradient early",
                partial(versions_have_k, change=twins.with_policy(_Impatient)),
                _ON,
            ),
            Control(
                "late gradients are taken",
                partial(versions_have_k, change=twins.with_policy(_Hospitable)),
                _ON,
            ),
            Control(
                "staleness counted after the apply",
                partial(versions_have_k, read=counted_after_the_apply),
                _ON,
            ),
        ),
    ),
)
