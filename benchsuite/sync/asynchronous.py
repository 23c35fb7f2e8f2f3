"""Asynchronous update: a gradient is applied the moment it arrives (the article's section 3.2.2;
Dean et al. 2012).

A worker pushes its gradient, the server applies it at once (version += 1) and answers at once with
the newest parameters, so nobody waits for the slowest. The price is staleness = version at apply -
version read. `lock = exclusive` is the article's form: ask for the lock (the ticket), update,
release. One server thread is the lock, and the lock wait runs from the sending of the ticket until
the apply starts.

Momentum mixes the gradients of workers that looked at different parameters. `momentum = shared`
keeps one vector for all, in the recipe's optimiser. `per_worker` keeps a vector v_i per worker:
v_i = m v_i + g_i, p -= lr v_i. `dana` does the same, and answers a worker with where the momentum
of all will have carried the parameters, p - lr m sum v_j: DANA-Zero (Hakimi et al. 2019, arXiv
1907.11612, algorithm 4). With one worker that is Nesterov's momentum.

Sends M bytes each way per push. A server keeps nothing beside its slice, or (N + 2) M / S with a
momentum per worker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchsuite import sync
from benchsuite.comm import Comm, Traffic
from benchsuite.compression import Compression
from benchsuite.errors import UsageError
from benchsuite.sync import Apply, Events, ServerPolicy, Setting, Work, count, hand_out
from benchsuite.sync.averaging import largest_slice
from benchsuite.sync.push_pull import push_pull_traffic
from benchsuite.topology import Topology
from benchsuite.topology.parameter_server import Topology as ParameterServer
from benchsuite.update import Updater, clip
from benchsuite.workload import Batch, Part, Recipe, Shapes


@dataclass
class Strategy(sync.Strategy):
    """A push is applied at once, and its worker is answered at once."""

    lock: Literal["exclusive", "none"] = "exclusive"
    """`none`: `server_threads` threads apply without a lock; torn reads are allowed and counted."""

    server_threads: int = 2
    """Threads per server when lock = none."""

    lr_rule: Literal["equal_sample", "same"] = "equal_sample"
    """A push is on batch/N samples: `equal_sample` steps with lr/N, `same` with the synchronous
    lr.
    """

    momentum: Literal["shared", "per_worker", "dana"] = "shared"
    """Whose momentum the server keeps (SGD with momentum; `shared` takes any optimiser). `dana`:
    answers look ahead.
    """

    survives = "worker"
    snapshot_of = "servers"
    clips_mean = False

    short_label = "async"
    order = 1
    colour = 3
    looks = {"parameter_server": (3, 3, 0)}
    topologies = ("server",)
    topologies_why = (
        "workers are answered one by one; a ring is a collective: every rank must enter the same "
        "step"
    )
    by_arrival = True
    answers_at_once = True
    model_parallel = False
    takes_votes = False
    at_least = {"server_threads": 1}
    refuses = (
        {
            "rule": "momentum",
            "when": (
                'momentum in ("per_worker", "dana") and workload.optimizer in ("adam", "adamw")'
            ),
            "reason": (
                "momentum = {momentum} of {name} with optimizer = {workload.optimizer} of "
                "{workload.name}: it is the momentum of SGD that is kept per worker"
            ),
            "remedy": "set another optimizer, or momentum = shared",
        },
        {
            "rule": "momentum",
            "when": 'momentum in ("per_worker", "dana") and lock == "none"',
            "reason": (
                "momentum = {momentum} with lock = none: threads without a lock would add to one "
                "another's momentum vectors"
            ),
            "remedy": "set lock = exclusive, or momentum = shared",
        },
        {
            "rule": "momentum",
            "when": 'momentum in ("per_worker", "dana") and workload.momentum == 0',
            "reason": (
                "momentum = {momentum} of {name} with momentum = 0 of {workload.name}: there is "
                "none to keep"
            ),
            "remedy": "set options.{workload.name}.momentum = 0.9, or momentum = shared",
        },
    )

    # -- a run -------------------------------------------------------------------------------------

    def start(
        self, comm: Comm, part: Part, recipe: Recipe, topology: Topology, compression: Compression
    ) -> None:
        assert isinstance(topology, ParameterServer), "rules: asynchronous needs parameter_server"
        self._comm = comm
        self._part = part
        self._recipe = recipe
        self._topology = topology

        self._num_workers = topology.num_workers

        # Shards of the budget in all, and the one that this worker has taken.
        self._num_pushes = recipe.budget // recipe.global_batch * self._num_workers
        self._index = 0

        self.events = {"pushes": 0, "replies": 0}
        topology.use_threads(self.num_threads(self._num_workers))

        # A recipe that does not fit is refused now, on every rank, rather than at the first push.
        if self.momentum != "shared":
            self._momentum_and_decay()

    def num_threads(self, num_workers: int) -> int:
        """Says how many threads each server has.

        Whoever says goodbye for a lost worker needs it too, to reach the thread of that worker.
        """
        return min(self.server_threads, num_workers) if self.lock == "none" else 1

    def make_updater(self, params: Tensor) -> Updater:
        # A push is on batch/N samples, and there are N times as many steps.
        scale = 1 / self._num_workers if self.lr_rule == "equal_sample" else 1.0
        updater = Updater(params, self._recipe, lr_scale=scale)

        # The policy keeps the momentum and adds the weight decay: the optimiser must not do it
        # once more.
        if self.momentum != "shared":
            for group in updater.optimizer.param_groups:
                group.update(momentum=0.0, nesterov=False, weight_decay=0.0)

        self._server_group = updater.optimizer.param_groups[0]

        return updater

    def next_index(self) -> Work | None:
        """Takes the next shard that nobody has taken, whoever is fast."""
        self._index, work = hand_out(self._comm, self._num_workers, self._num_pushes)
        return work

    def step(self, batch: Batch) -> float:
        """Computes one gradient g_i, pushes it, and loads the newest parameters."""
        part = self._part
        loss = part.gradient(batch)
        assert loss is not None
        clip(part.grad, self._recipe.clip_norm)
        self._topology.exchange(part.grad, part.params, tag=self._index)
        self.events["pushes"] += 1
        self.events["replies"] += 1

        return loss

    def finish(self) -> None:
        self._topology.goodbye()

    def snapshot(self) -> Tensor:
        return self._part.params

    def policy(self) -> ApplyAtOnce:
        if self.momentum == "shared":
            return ApplyAtOnce()

        # The learning rate is asked for at each answer, because the schedule moves it.
        factor, decay = self._momentum_and_decay()
        return MomentumPerWorker(self._num_workers, factor, decay, lr=self._look_ahead_lr)

    def _look_ahead_lr(self) -> float:
        """Gives the learning rate by which answers look ahead: the optimiser's of now, or 0."""
        return float(self._server_group["lr"]) if self.momentum == "dana" else 0.0

    def _momentum_and_decay(self) -> tuple[float, float]:
        """Gives the momentum and the weight decay of the recipe's optimiser.

        UsageError where it is not SGD with momentum.
        """
        # An optimiser is made only to be asked: the recipe does not say what it makes.
        optimizer = self._recipe.make_optimizer([torch.zeros(1)])
        group = optimizer.param_groups[0]
        if (
            not isinstance(optimizer, torch.optim.SGD)
            or group["momentum"] <= 0
            or group["dampening"] != 0
        ):
            raise UsageError(
                f"momentum = {self.momentum} of asynchronous keeps a momentum vector per worker, "
                f"and this recipe's optimiser is {type(optimizer).__name__} "
                f"(momentum = {group.get('momentum')}, dampening = {group.get('dampening')}): "
                "set the workload's momentum above 0 (SGD), or momentum = shared"
            )

        return float(group["momentum"]), float(group["weight_decay"])

    def num_pushes(self) -> int:
        return self._num_pushes

    # -- predictions -------------------------------------------------------------------------------

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        # Each worker's count is that of equally fast workers; the total is exact for any.
        each = [num_batches] * setting.num_workers
        return {"pushes": each, "replies": each}

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        if not server or self.momentum == "shared":
            return 0

        # One vector per worker, their sum, and the answer.
        return (setting.num_workers + 2) * largest_slice(shapes, setting)

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        workers = range(setting.num_workers)
        return push_pull_traffic(
            shapes,
            setting,
            pushes=[count(events, "pushes", worker) for worker in workers],
            replies=[count(events, "replies", worker) for worker in workers],
        )


class ApplyAtOnce(ServerPolicy):
    """A server to which every push is one optimiser step, and whose answer comes at once."""

    def start(self, shard: Tensor, apply: Apply) -> None:
        self._shard = shard
        self._apply = apply

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        self._apply(flat)

        return [worker]

    def on_goodbye(self, worker: int) -> list[int]:
        return []

    def answer(self, worker: int) -> Tensor:
        return self._shard

    def snapshot(self) -> Tensor:
        return self._shard


class MomentumPerWorker(ApplyAtOnce):
    """A server that keeps a momentum vector for each worker: v_i = m v_i + g_i.

    Where `lr` gives a number above 0, answers look ahead by lr m times the sum of all v_j (DANA).
    """

    def __init__(
        self, num_workers: int, momentum: float, weight_decay: float, *, lr: Callable[[], float]
    ) -> None:
        self._num_workers = num_workers
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._lr = lr

    def start(self, shard: Tensor, apply: Apply) -> None:
        super().start(shard, apply)

        # All are (P/S,): v_i of each worker, the sum of all v_j, and what is given away.
        self._own = [torch.zeros_like(shard) for _ in range(self._num_workers)]
        self._sum = torch.zeros_like(shard)
        self._ahead = torch.empty_like(shard)

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        """Moves the worker's v_i by its push g_i, and steps by v_i.

        The sum follows by the difference, so that a push costs the same for any number of workers.
        """
        mine = self._own[worker]
        self._sum.sub_(mine)

        mine.mul_(self._momentum).add_(flat)
        if self._weight_decay:
            mine.add_(self._shard, alpha=self._weight_decay)  # g_i includes it, as in SGD

        self._sum.add_(mine)
        # A copy, because the optimiser may keep or change what it is given.
        self._apply(self._ahead.copy_(mine))

        return [worker]

    def answer(self, worker: int) -> Tensor:
        """Gives p - lr m sum v_j, which are the parameters themselves where lr is 0."""
        way = -self._lr() * self._momentum
        return torch.add(self._shard, self._sum, alpha=way, out=self._ahead)
