"""Where a worker's batches come from: the data, or acting (reinforcement learning).

A plain workload is asked for the batch that the strategy names. One that collects acts with the
worker's own, current parameters in the worker's own environments: where its minibatches are used
up, it plays the next rollout. Where batches are handed out to whoever is free, being handed one
only says that there is one more.

Advantages are normalised over the global minibatch where replicas hold the same parameters at every
step: then N workers make the update of one. The sums of all minibatches are known right after a
rollout, so one exchange per rollout does: every worker sends 3 float64 per minibatch to every other
one, N (N-1) messages. Elsewhere each worker normalises its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchsuite.comm import Comm, Traffic
from benchsuite.sync import Events, Setting, Work, count
from benchsuite.topology import rank_order_sum
from benchsuite.topology.direct import Topology as Direct
from benchsuite.workload import Batch, Infer, Rollout

STATISTICS_BYTES = 3 * 8  # of a minibatch: sum, sum of squares, number


class Batches:
    """The batches of one worker.

    Made on every rank, because a process group may be made. strategy: None in one process without a
    strategy. device: the one whose memory the backend sends.
    """

    def __init__(
        self,
        workload: Any,
        comm: Comm | None = None,
        *,
        num_workers: int = 1,
        strategy: Any = None,
        device: torch.device | None = None,
    ) -> None:
        self._workload = workload
        self._device = device
        self._trajectory_length = 0 if strategy is None else strategy.batches_per_trajectory

        self.collects = workload.collects
        self._apart = strategy is not None and is_apart(strategy)
        self._rank = 0 if comm is None else comm.rank

        # Joins the workers, where they normalise their advantages together.
        self._direct: Direct | None = None

        if comm is not None and num_workers > 1 and self.collects and agrees(strategy):
            workers = comm.split(range(num_workers))
            if workers is not None:
                self._direct = Direct()
                self._direct.start(workers)

        self._environments: Any = None
        self._taken = 0  # batches that this worker was given
        self._number = -1  # of the rollout that is being used up
        self._statistics = torch.empty(0)  # (minibatches, 3), see `Rollout.statistics`
        self._rollout: Rollout | None = None
        self.events = {"rollouts": 0} if self.collects else {}

    @property
    def per_rollout(self) -> int:
        """Steps that share a rollout; 0 where nobody acts."""
        if not self.collects:
            return 0

        return 1 if self._trajectory_length else int(self._workload.per_rollout)

    @property
    def per_push(self) -> int:
        """Global batches whose samples a push stands for, one worker's share of each."""
        return int(self._trajectory_length or 1)

    def fetch(self, work: Work, act: Infer) -> Batch:
        """The batch of this work. act: the worker's policy with its parameters of now."""
        index, shard, num_shards = work

        if not self.collects:
            batch: Batch = self._workload.batch(index, shard=shard, num_shards=num_shards)
            return batch

        if self._apart:
            # Whoever is handed a batch plays in its own environments: the number says nothing.
            index = self._taken
            shard = self._rank

        self._taken += 1
        if self._environments is None:
            self._environments = self._workload.environments(shard=shard, num_shards=num_shards)

        length = self._trajectory_length

        if length:
            self.events["rollouts"] += 1
            # A learner computes the loss: everything that it needs travels along.
            trajectory: Batch = self._workload.trajectory(act, self._environments, index, length)
            return trajectory

        # A rollout has as many minibatches as its workload says, one for each step.
        number, position = divmod(index, self._workload.per_rollout)
        if number != self._number:
            self._rollout = self._collect(act, number)
        assert self._rollout is not None
        return self._rollout.batch(position, self._statistics[position])

    def _collect(self, act: Infer, number: int) -> Rollout:
        """Plays the next rollout, and finds what its minibatches are normalised by."""
        # The environments go on where the rollout before has left them.
        rollout: Rollout = self._workload.collect(act, self._environments, number)
        self._number = number
        self._statistics = rollout.statistics()
        self.events["rollouts"] += 1
        if self._direct is not None:
            self._statistics = self._sum_over_workers(self._direct, self._statistics)
        return rollout

    def _sum_over_workers(self, direct: Direct, own: Tensor) -> Tensor:
        """The sum of all workers' statistics, added in rank order: the same bits on all."""
        rows = direct.gather(own.flatten().to(self._device))  # of each worker (3 minibatches,)
        total = torch.empty_like(rows[0])
        rank_order_sum(rows, total)

        return total.cpu().view_as(own)


def is_apart(strategy: Any) -> bool:
    """Whether batches are handed out to workers that do not step together."""
    return bool(strategy.apart) or strategy.snapshot_of == "servers"


def agrees(strategy: Any) -> bool:
    """Whether replicas hold the same parameters at every step, so that they may normalise
    together.
    """
    return strategy.snapshot_of == "replica" and not strategy.goes_on and not is_apart(strategy)


def example(workload: Any, act: Infer, *, num_shards: int) -> Batch:
    """The first batch of a worker, for shapes. act: any function with the shapes of the model."""
    return Batches(workload).fetch((0, 0, num_shards), act)


def predicted_traffic(events: Events, setting: Setting) -> Traffic:
    """What workers tell each other of their advantages in a whole run, from its rollouts."""
    one = Direct().predicted_gather(
        setting.agreed_batches * STATISTICS_BYTES, num_workers=setting.num_workers
    )
    return one.times(count(events, "rollouts", 0))


def expected_events(workload: Any, num_batches: int, setting: Setting) -> Events:
    """The number of rollouts in an undisturbed run; {} where nobody acts."""
    if not workload.collects:
        return {}

    num_rollouts = -(-num_batches // workload.per_rollout)  # the last one may be used in part
    return {"rollouts": [num_rollouts] * setting.num_workers}
