"""Stale synchronous parallel: fast workers run ahead, but never by more than `slack` steps (Ho et
al. 2013, SSP).

A worker may START step t only if t - min_j(finished steps of j) <= slack; until then the server
holds the answer to its push. A worker that has used its budget leaves the minimum. Several servers
decide each for itself, by the same rule.

`apply = per_clock`: the mean of a clock's N gradients (step t of everybody), added in rank order
and divided once, is one optimiser step, made when the last of them is in. With slack 0 it is
`synchronous`, for any optimiser. `apply = per_push`: every gradient is applied at once, with lr/N,
as `asynchronous` does; with slack -1 (no bound) it is that.

Sends M bytes each way per push. A server keeps at most N (slack + 1) M / S of gradients with
per_clock, and nothing with per_push.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchsuite import sync
from benchsuite.comm import Comm, Traffic
from benchsuite.compression import Compression
from benchsuite.sync import Apply, Events, ServerPolicy, Setting, Work, count
from benchsuite.sync.averaging import largest_slice
from benchsuite.sync.push_pull import push_pull_traffic
from benchsuite.topology import Topology, rank_order_sum
from benchsuite.topology.parameter_server import Topology as ParameterServer
from benchsuite.topology.parameter_server import clip_traffic
from benchsuite.update import Updater, clip
from benchsuite.workload import Batch, Part, Recipe, Shapes

UNBOUNDED = -1  # the slack that holds nobody


@dataclass
class Strategy(sync.Strategy):
    """A worker waits only for others that are more than `slack` steps behind it.

    A worker that is slow for a moment holds nobody up; one that always is, sets the pace.
    """

    slack: int = 3
    """s, steps that a worker may be ahead of the slowest (-1 = no bound)."""

    apply: Literal["per_clock", "per_push"] = "per_clock"
    """One step per clock on the mean of all, or one per push with lr/N."""

    snapshot_of = "servers"

    short_label = "stale sync"
    order = 3
    colour = 4
    topologies = ("server",)
    topologies_why = (
        "workers are answered one by one; a ring is a collective: every rank must enter the same "
        "step"
    )
    by_arrival = True
    model_parallel = False
    takes_votes = False
    refuses = (
        {
            "rule": "slack",
            "when": "slack < -1",
            "reason": "slack = {slack:g}: steps ahead, 0 or more, or -1 for no bound",
            "remedy": "set slack = 0 or -1",
        },
        {
            "rule": "slack",
            "when": 'slack == -1 and apply == "per_clock"',
            "reason": (
                "slack = -1 with apply = per_clock: without a bound a server would keep any "
                "number of clocks"
            ),
            "remedy": "set slack = 0 or more, or apply = per_push",
        },
    )

    @property
    def clips_mean(self) -> bool:
        """Says who clips: the servers clip a clock's mean, and workers their own pushes."""
        return self.apply == "per_clock"

    # -- a run -------------------------------------------------------------------------------------

    def start(
        self, comm: Comm, part: Part, recipe: Recipe, topology: Topology, compression: Compression
    ) -> None:
        assert isinstance(topology, ParameterServer), (
            "rules: stale_synchronous needs parameter_server"
        )
        self._part = part
        self._recipe = recipe
        self._topology = topology

        self._rank = comm.rank
        self._num_workers = topology.num_workers

        # Global batches of the budget, and how many of them are done.
        self._steps = recipe.budget // recipe.global_batch
        self._step = 0

        self.events = {"pushes": 0, "replies": 0}

    def make_updater(self, params: Tensor) -> Updater:
        # A push alone is on batch/N samples; a clock's mean is on the whole batch.
        scale = 1 / self._num_workers if self.apply == "per_push" else 1.0
        return Updater(params, self._recipe, lr_scale=scale)

    def next_index(self) -> Work | None:
        # Every worker has its own shard of the next global batch.
        if self._step == self._steps:
            return None

        return self._step, self._rank, self._num_workers

    def step(self, batch: Batch) -> float:
        part = self._part
        loss = part.gradient(batch)
        assert loss is not None
        if self.apply == "per_push":
            clip(part.grad, self._recipe.clip_norm)

        # Blocks while the server holds the answer: the bound is kept by that alone.
        number = self._step * self._num_workers + self._rank
        self._topology.exchange(part.grad, part.params, tag=number)

        self._step += 1
        self.events["pushes"] += 1
        self.events["replies"] += 1

        return loss

    def finish(self) -> None:
        self._topology.goodbye()

    def snapshot(self) -> Tensor:
        return self._part.params

    def policy(self) -> BoundedAhead:
        return BoundedAhead(self._num_workers, self.slack, per_clock=self.apply == "per_clock")

    def num_pushes(self) -> int:
        return self._steps * self._num_workers

    # -- predictions -------------------------------------------------------------------------------

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        each = [num_batches] * setting.num_workers
        # One step per clock, or one per push; only servers count them.
        updates = num_batches * (1 if self.apply == "per_clock" else setting.num_workers)

        return {
            "pushes": each,
            "replies": each,
            "updates": [0] * setting.num_workers + [updates] * setting.num_servers,
        }

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        if not server or self.apply == "per_push":
            return 0

        # The gradients of all open clocks, and the mean of the one that is applied.
        ahead = max(self.slack, 0) + 1
        return (setting.num_workers * ahead + 1) * largest_slice(shapes, setting)

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        workers = range(setting.num_workers)
        traffic = push_pull_traffic(
            shapes,
            setting,
            pushes=[count(events, "pushes", worker) for worker in workers],
            replies=[count(events, "replies", worker) for worker in workers],
        )

        # Servers agree on the norm of a mean only where they clip it.
        clips = setting.clip and self.clips_mean
        updates = count(events, "updates", setting.num_workers) if clips else 0

        return traffic + clip_traffic(setting.num_workers, setting.num_servers, updates)


class BoundedAhead(ServerPolicy):
    """A server that answers who is at most `slack` steps ahead of the slowest, and holds others.

    It applies the mean of each clock, or each push at once.
    """

    def __init__(self, num_workers: int, slack: int, *, per_clock: bool) -> None:
        self._slack = slack
        self._per_clock = per_clock
        self.applies_later = per_clock

        self._finished = [0] * num_workers  # steps, by worker
        self._active = set(range(num_workers))
        self._held: set[int] = set()  # workers that wait for their answer

        self.events: dict[str, int] = {"held": 0}

    def start(self, shard: Tensor, apply: Apply) -> None:
        self._shard = shard
        self._apply = apply

        # The next clock to be applied; the gradients of each open clock, by worker; vectors of
        # applied clocks, to be used again.
        self._clock = 0
        self._gradients: dict[int, list[Tensor | None]] = {}
        self._free: list[Tensor] = []
        if self._per_clock:
            self._mean = torch.empty_like(shard)

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        """Applies or keeps a push (P/S,), and answers all whose step may start now."""
        if self._per_clock:
            self._keep(worker, flat)
            self._apply_whole_clocks()
        else:
            self._apply(flat)

        # It may release others as well as itself: it may have been the slowest.
        self._finished[worker] += 1
        self._held.add(worker)
        answers = self._released()
        self.events["held"] += worker not in answers

        return answers

    def on_goodbye(self, worker: int) -> list[int]:
        # The minimum is over those who are left, or everybody would wait for the one who is not.
        self._active.discard(worker)
        return self._released()

    def _keep(self, worker: int, flat: Tensor) -> None:
        """Keeps a copy of a gradient with the clock that it belongs to."""
        slots = self._gradients.setdefault(self._finished[worker], [None] * len(self._finished))
        slot = self._free.pop() if self._free else torch.empty_like(flat)
        slot.copy_(flat)
        slots[worker] = slot

    def _apply_whole_clocks(self) -> None:
        """Applies the next clocks for as long as all gradients of one are in.

        One push makes at most one clock whole; the loop ends with the first that is not.
        """
        while (slots := self._gradients.get(self._clock)) is not None:
            # By worker, and so in rank order.
            gradients = [slot for slot in slots if slot is not None]
            if len(gradients) < len(slots):
                return

            rank_order_sum(gradients, self._mean)
            self._mean.div_(len(gradients))
            self._apply(self._mean, num_gradients=len(gradients), oldest_of=range(len(gradients)))

            # What was applied makes room for the next clock.
            self._free += gradients
            del self._gradients[self._clock]
            self._clock += 1

    def _released(self) -> list[int]:
        """Takes out of the held workers whoever may start its next step, in rank order."""
        # With nobody left the minimum does not matter: nobody can be held.
        slowest = min((self._finished[worker] for worker in self._active), default=0)

        answers = sorted(
            worker
            for worker in self._held
            if self._slack == UNBOUNDED or self._finished[worker] - slowest <= self._slack
        )

        self._held.difference_update(answers)

        return answers

    def answer(self, worker: int) -> Tensor:
        return self._shard

    def snapshot(self) -> Tensor:
        return self._shard
