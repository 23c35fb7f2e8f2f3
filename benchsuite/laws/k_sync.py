"""Laws of k_sync: a version is made of its first K = N - c gradients, later ones are dropped and counted.

Without backup workers it is synchronous (family `synchronous`); its parameters are checked by `replay`, the identity by
`server_log`.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from benchsuite.cell import Cell
from benchsuite.laws import Control, Figure, Law, MakeRanks, twins
from benchsuite.laws.runs import Change, PushLog, option, run
from benchsuite.laws.server_log import Read, as_written, counted_after_the_apply
from benchsuite.sync import Apply


def versions_have_k(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None, read: Read = as_written
) -> Figure:
    """From the log alone: an update after every K gradients in time, and not before, until workers leave; every push
    is in one update or dropped, never both."""
    result = run(make_ranks, cell, change=change)
    k = result.cell.num_workers - int(option(result.cell, "k_sync", "backup_workers"))
    wrong = [_wrong_groups(read(log), k) for log in result.logs]
    drops = [sum(stale > 0 for stale in log.staleness) for log in result.logs]
    pushes = [len(log.worker) for log in result.logs]
    versions = [log.version for log in result.logs]
    return Figure(
        sum(wrong),
        0,
        f"{wrong} versions without K = {k}; {pushes} pushes, {drops} dropped, {versions} updates, {cell.label}",
    )


def _wrong_groups(log: PushLog, k: int) -> int:
    """Versions that are not made of K gradients of K workers. The last N - 1 may have fewer: workers leave."""
    num_workers = len(log.last_read)
    groups: dict[int, list[int]] = {version: [] for version in range(log.version)}
    wrong = 0
    for worker, before, stale in zip(log.worker, log.version_before, log.staleness, strict=True):
        if stale < 0 or (stale == 0 and before not in groups):
            wrong += 1
        elif stale == 0:
            groups[before].append(worker)
    for version, workers in groups.items():
        whole = len(workers) == k or (0 < len(workers) < k and version > log.version - num_workers)
        wrong += not (whole and len(set(workers)) == len(workers))
    return wrong


class _Impatient(twins.Policy):
    """Takes one gradient less than K per version."""

    def start(self, shard: Tensor, apply: Apply) -> None:
        self._whole._k -= 1
        super().start(shard, apply)


class _Hospitable(twins.Policy):
    """Takes late gradients as if they were in time."""

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        return super().on_push(worker, self._whole._version, flat)


_ON = {"sync": "k_sync", "topology": "parameter_server", "servers": 1, "replicas": 4}

LAWS = (
    Law(
        "a version is its first K gradients",
        versions_have_k,
        lambda cell: cell.sync == "k_sync",
        (
            Control(
                "a version ends one gradient early", partial(versions_have_k, change=twins.with_policy(_Impatient)), _ON
            ),
            Control("late gradients are taken", partial(versions_have_k, change=twins.with_policy(_Hospitable)), _ON),
            Control("staleness counted after the apply", partial(versions_have_k, read=counted_after_the_apply), _ON),
        ),
    ),
)
