"""Laws by replay: from the push log alone, one process computes every version of the parameters.

Each push's gradient is computed again from its batch and the version that it claims to have read;
with several servers that is one version per slice. This ties the log to the run: a gradient of
another version, a push applied twice, an answer that was lost, all lead to other parameters.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import twins
from benchsuite.laws.harness.runs import (
    Change,
    PushLog,
    Run,
    option,
    relative,
    run,
    sync_of,
    worst,
)
from benchsuite.laws.server_log import Read, as_written, has_lock, is_asynchronous, reads_forgotten
from benchsuite.plan.cell import Cell
from benchsuite.worker import setup
from benchsuite.workload import seeded_layers

FLOAT64 = 1e-10


def push_log_replay(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None, read: Read = as_written
) -> Figure:
    """Every version of every server's slice follows from the push log.

    Bound: a relative error of 1e-10. In the twins the version read is miscounted, gradients are one
    batch late, answers are lost or torn, or a mean is not divided.
    """
    result = run(make_ranks, cell, change=change)
    versions = Replay(result, [read(log) for log in result.logs]).versions()
    value, where = worst(
        [
            (
                relative(mine - theirs, theirs) if mine.shape == theirs.shape else float("nan"),
                f"server {j}, version {v}",
            )
            for j, server in enumerate(result.servers)
            for v, (mine, theirs) in enumerate(_paired(server.params, versions[j]))
        ]
    )
    stale = sum(sum(log.staleness) for log in result.logs)
    return Figure(
        value,
        FLOAT64,
        f"||difference|| / ||slice||, {where}, staleness {stale} in all, {cell.label}",
    )


def _paired(mine: list[Tensor], theirs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The two lists version by version; where one is longer, its rest is compared with nothing."""
    none = torch.zeros(0)
    length = max(len(mine), len(theirs))
    longer = [side + [none] * (length - len(side)) for side in (mine, theirs)]
    return list(zip(*longer, strict=True))


class Replay:
    """The servers' updates in the order of their logs, with gradients that are computed here."""

    def __init__(self, result: Run, logs: list[PushLog]) -> None:
        cell = self._cell = result.cell
        dtype = setup.DTYPES[cell.precision]
        self._workload = setup.start_workload(cell)
        self._recipe = setup.make_recipe(cell, self._workload)
        self._model = nn.Sequential(*seeded_layers(self._workload, cell.seed)).to(dtype)
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        start = nn.utils.parameters_to_vector(self._parameters).detach()
        self._at_once = (
            sync_of(cell) == "asynchronous"
            or option(cell, "stale_synchronous", "apply") == "per_push"
        )
        self._gradients: dict[int, Tensor] = {}
        self._read: list[dict[int, int]] = [
            dict(zip(log.tag, log.version_read, strict=True)) for log in logs
        ]
        self._slices = result.slices
        self._servers = [
            _Server(start[begin:end].clone(), _updates(log, cell, at_once=self._at_once), self)
            for (begin, end), log in zip(self._slices, logs, strict=True)
        ]

    def versions(self) -> list[list[Tensor]]:
        """Per server: its slice at the start and after every update."""
        progress = True
        while progress:
            progress = False
            for server, (begin, end) in zip(self._servers, self._slices, strict=True):
                while server.pending and all(self._known(tag) for tag in server.pending[0][0]):
                    tags, pushes_before = server.pending.pop(0)
                    rows = [self._gradient(tag)[begin:end] for tag in tags]
                    server.step(torch.stack(rows).sum(0) / len(rows), pushes_before)
                    progress = True
        return [server.versions for server in self._servers]

    def optimizer(self, params: Tensor) -> torch.optim.Optimizer:
        """The recipe's optimiser on one slice."""
        return self._recipe.make_optimizer([params])

    def lr(self, pushes_before: int) -> float:
        """The learning rate after so many pushes; a push of batch/N samples goes with lr/N."""
        samples = int(pushes_before * self._recipe.global_batch / self._cell.num_workers)
        lr = self._recipe.lr(min(samples / self._recipe.budget, 1.0))
        cell = self._cell
        if sync_of(cell) == "stale_synchronous":
            return lr / cell.num_workers if self._at_once else lr
        if option(cell, sync_of(cell), "lr_rule") != "equal_sample":
            return lr
        if self._at_once:
            return lr / cell.num_workers
        share = 1 - int(option(cell, "k_sync", "backup_workers")) / cell.num_workers
        return lr if option(cell, "k_sync", "wait") else lr * share

    def clip(self, gradient: Tensor) -> None:
        """Clips one gradient as the recipe says."""
        if self._recipe.clip_norm is not None:
            holder = nn.Parameter(torch.zeros_like(gradient))
            holder.grad = gradient
            nn.utils.clip_grad_norm_([holder], self._recipe.clip_norm)

    @property
    def clips_means(self) -> bool:
        return not self._at_once

    def _known(self, tag: int) -> bool:
        """Whether every slice has reached the version that this push has read.

        An impossible read is never reached.
        """
        reached = [len(server.versions) for server in self._servers]
        return all(
            read.get(tag, 0) < versions for read, versions in zip(self._read, reached, strict=True)
        )

    def _gradient(self, tag: int) -> Tensor:
        if tag not in self._gradients:
            read = [
                server.versions[versions[tag]]
                for server, versions in zip(self._servers, self._read, strict=True)
            ]
            nn.utils.vector_to_parameters(torch.cat(read), self._parameters)
            index, shard = divmod(tag, self._cell.num_workers)
            batch = self._workload.batch(index, shard=shard, num_shards=self._cell.num_workers)
            loss = self._workload.loss(self._model(batch.x), batch)
            flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, self._parameters)])
            if not self.clips_means:
                self.clip(flat)
            self._gradients[tag] = flat
        return self._gradients[tag]


class _Server:
    """One server's slice, stepped by torch's optimiser."""

    def __init__(self, start: Tensor, updates: list[tuple[list[int], int]], replay: Replay) -> None:
        self.versions: list[Tensor] = [start.clone()]
        self.pending = updates
        self._params = start
        self._replay = replay
        self._optimizer = replay.optimizer(start)

    def step(self, gradient: Tensor, pushes_before: int) -> None:
        if self._replay.clips_means:
            self._replay.clip(gradient)
        for group in self._optimizer.param_groups:
            group["lr"] = self._replay.lr(pushes_before)
        self._params.grad = gradient
        self._optimizer.step()
        self.versions.append(self._params.clone())


def _updates(log: PushLog, cell: Cell, *, at_once: bool) -> list[tuple[list[int], int]]:
    """Per update: the batches whose gradients are in it, and how many pushes came before those."""
    if at_once:
        return [([tag], row) for row, tag in enumerate(log.tag)]
    if sync_of(cell) == "stale_synchronous":
        return _clocks(log, cell.num_workers)
    updates = []
    drops = bool(option(cell, "k_sync", "wait"))
    for version in range(log.version):
        members = [row for row, before in enumerate(log.version_before) if before == version]
        if drops:
            members = [row for row in members if log.version_read[row] == version]
        in_rank_order = sorted(members, key=lambda row: log.worker[row])
        arrived = sum(before <= version for before in log.version_before)
        updates.append(([log.tag[row] for row in in_rank_order], arrived - len(members)))
    return updates


def _clocks(log: PushLog, num_workers: int) -> list[tuple[list[int], int]]:
    """The updates of stale synchronous training, which are clocks.

    A clock is the same step of all workers, made when the last of its gradients is in.
    """
    clocks = []
    for clock in range(log.version):
        rows = [row for row, tag in enumerate(log.tag) if tag // num_workers == clock]
        clocks.append((sorted(log.tag[row] for row in rows), max(rows) + 1 - num_workers))
    return clocks


def _applies(cell: Cell) -> bool:
    """Whether the push log says all that an update depends on."""
    single = (
        cell.num_servers == 1
        or setup.make_recipe(cell, setup.make_workload(cell)).clip_norm is None
    )
    if is_asynchronous(cell):
        plain = option(cell, "asynchronous", "momentum") == "shared"  # other forms: momentum.py
        return has_lock(cell) and plain and cell.compression == "none"
    if sync_of(cell) == "stale_synchronous":
        return cell.compression == "none" and (
            single or option(cell, "stale_synchronous", "apply") == "per_push"
        )
    # A mean is clipped over all slices of one version, so one server must have them all. Gradients
    # that were given up count as progress of the run but do not stand in the log.
    finished = sync_of(cell) == "k_sync" and option(cell, "k_sync", "late") == "finish"
    return finished and cell.compression == "none" and single


_ON = {"sync": "asynchronous", "topology": "parameter_server", "servers": 1, "replicas": 3}
_K = {**_ON, "sync": "k_sync"}

LAWS = (
    Law(
        "the push log replays to the same parameters",
        push_log_replay,
        _applies,
        (
            Control(
                "the version read is miscounted",
                partial(push_log_replay, read=reads_forgotten),
                _ON,
            ),
            Control(
                "gradients are one batch late",
                partial(push_log_replay, change=twins.late_gradient),
                _ON,
            ),
            Control(
                "the answers are lost",
                partial(push_log_replay, change=twins.with_server(twins.Deaf)),
                _ON,
            ),
            Control(
                "torn answers", partial(push_log_replay, change=twins.with_policy(twins.Torn)), _ON
            ),
            Control(
                "gradients are one batch late, k_sync",
                partial(push_log_replay, change=twins.late_gradient),
                _K,
            ),
            Control(
                "a mean that is not divided",
                partial(push_log_replay, change=twins.with_policy(twins.Undivided)),
                _K,
            ),
        ),
    ),
)
