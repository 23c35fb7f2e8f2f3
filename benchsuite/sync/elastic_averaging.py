"""Elastic averaging: replicas explore alone, a spring ties each of them to a centre c (Zhang et al.
2015, EASGD).

arXiv 1412.6651, equations 3 and 4: every `period` steps d_i = moving_rate (x_i - c); x_i -= d_i;
c += sum d_i, so that sum x_i + c is conserved. What is evaluated is the mean of the replicas.

Synchronous over a collective: every rank keeps the same c, and the mean of the d_i travels. This
form is stable if and only if moving_rate (N + 1) < 2. Asynchronous over a parameter server, which
keeps c: a worker pushes x_i, the server moves c at once and answers x_i - d_i.

Sends one mean of M bytes every `period` steps, or M each way. Keeps 2 M on a worker (c and d) over
a collective, 2 M/S on a server.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite import sync
from benchsuite.comm import Comm, Traffic
from benchsuite.compression import Compression
from benchsuite.sync import Apply, Events, ServerPolicy, Setting, Work, count, hand_out
from benchsuite.sync.averaging import largest_slice, means_traffic
from benchsuite.sync.push_pull import push_pull_traffic
from benchsuite.topology import Topology
from benchsuite.topology.parameter_server import Topology as ParameterServer
from benchsuite.update import Load, Updater, clip_part
from benchsuite.workload import Batch, Part, Recipe, Shapes, numel


@dataclass
class Strategy(sync.Strategy):
    """Replicas step alone, and are pulled towards a common centre.

    They are not made equal by an exchange, so that each may explore its own surroundings.
    """

    period: int = 4
    """Local steps between two exchanges with the centre."""

    moving_rate: float = 0.1
    """Share of the way to the centre that an exchange takes; replicas x moving_rate <= 1."""

    alone_is_plain = False
    snapshot_of = "mean"
    clips_mean = False
    goes_on = True

    short_label = "elastic avg"
    order = 9
    colour = "#56220f"
    topologies = ("collective", "server")
    topologies_why = "every replica's vector enters one mean; {topology.called} has no such mean"
    by_arrival = True
    takes_votes = False
    compresses_over = ("collective",)
    at_least = {"period": 1}
    refuses = (
        {
            "rule": "parallel x sync",
            "when": 'topology.kind == "server" and parallel.divides',
            "reason": (
                "sync = {name} over topology = {topology.name} with parallel = {parallel.name}: "
                "batches are handed out to single ranks, and the parts of a replica work on one "
                "batch together"
            ),
            "remedy": "set topology to a collective",
        },
        {
            "rule": "moving rate",
            "when": "not 0 < moving_rate < 1",
            "reason": "moving_rate = {moving_rate:g}: 0 < moving_rate < 1 is needed",
            "remedy": "set moving_rate = 0.1",
        },
        {
            "rule": "moving rate",
            "when": "0 < moving_rate < 1 and cell.replicas * moving_rate > 1 + 1e-12",
            "reason": (
                "replicas({cell.replicas}) x moving_rate({moving_rate:g}) = {cell.replicas * "
                "moving_rate:g} > 1: the centre would overshoot"
            ),
            "remedy": "set moving_rate to at most {1 / cell.replicas:.4g}",
        },
        {
            "rule": "compression x sync",
            "when": 'compression.name != "none" and topology.kind == "server"',
            "reason": (
                "compression = {compression.name} with sync = {name} over topology = "
                "{topology.name}: it pushes parameters; a compression acts on gradients or "
                "differences"
            ),
            "remedy": "set topology to a collective, or compression = none",
        },
    )

    # -- a run -------------------------------------------------------------------------------------

    def start(
        self, comm: Comm, part: Part, recipe: Recipe, topology: Topology, compression: Compression
    ) -> None:
        self._comm = comm
        self._part = part
        self._recipe = recipe
        self._topology = topology
        self._compression = compression

        self._rank = comm.rank
        self._num_workers = topology.num_workers
        self._server = topology if isinstance(topology, ParameterServer) else None

        # Over a server nobody waits for another, so batches are handed out.
        self.apart = self._server is not None

        # Global batches of the budget, and how many of them are done.
        self._steps = recipe.budget // recipe.global_batch
        self._step = 0
        self._index = 0

        self.events = {"synchronisations": 0}
        if comm.rank < self._num_workers:
            self._updater = Updater(part.params, recipe, shapes=part.shapes)

        if self._server is None:
            # c, the same on all ranks, and d_i: both (P,).
            self.centre = part.params.clone()
            self._pull = torch.empty_like(part.params)

    def make_updater(self, params: Tensor) -> Load:
        return Load(params)

    def next_index(self) -> Work | None:
        if self._server is None:
            return (
                None if self._step == self._steps else (self._step, self._rank, self._num_workers)
            )

        self._index, work = hand_out(self._comm, self._num_workers, self._steps * self._num_workers)
        return work

    def step(self, batch: Batch) -> float:
        """Makes one step of this replica, and an exchange with the centre every `period` steps."""
        loss = self._part.gradient(batch)
        assert loss is not None
        clip_part(self._part, self._recipe.clip_norm)
        # The schedule goes by global batches: by the own steps, or by what was handed out.
        at = self._step if self._server is None else self._index // self._num_workers
        self._updater.step(self._part.grad, samples=at * self._recipe.global_batch)
        self._step += 1
        if self._step % self.period == 0:
            self._exchange()
            self.events["synchronisations"] += 1

        return loss

    def _exchange(self) -> None:
        """Moves the replica and the centre towards each other."""
        params = self._part.params  # x_i (P,)

        if self._server is not None:
            self._server.exchange(params, params, tag=self._index)
            return

        torch.sub(params, self.centre, out=self._pull).mul_(self.moving_rate)  # d_i
        params.sub_(self._pull)

        # The mean of the d_i travels; N times the mean is their sum.
        self._compression.mean(self._pull, self._topology)
        self.centre.add_(self._pull, alpha=self._num_workers)

    def finish(self) -> None:
        if self._server is not None:
            self._server.goodbye()

    def snapshot(self) -> Tensor:
        return self._part.params

    def policy(self) -> Centre:
        return Centre(self.moving_rate)

    def num_pushes(self) -> int:
        # Each worker counts its own steps: at most one push of each is added by rounding.
        return self._steps * self._num_workers // self.period + self._num_workers

    # -- predictions -------------------------------------------------------------------------------

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        """Gives the exchanges of each worker.

        Over a server they are exact where workers are equally fast: each counts its own steps.
        """
        return {"synchronisations": [num_batches // self.period] * setting.num_workers}

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        # Over a server a worker keeps nothing: it is answered with its new x_i.
        if server:
            return 2 * largest_slice(shapes, setting)  # d and the answer

        return 0 if setting.num_servers else 2 * numel(shapes) * setting.itemsize

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        # Over a collective one mean per exchange; over servers each worker has its own count.
        if not setting.num_servers:
            return means_traffic(shapes, count(events, "synchronisations", 0), setting)

        each = [count(events, "synchronisations", worker) for worker in range(setting.num_workers)]
        return push_pull_traffic(shapes, setting, pushes=each, replies=each)


class Centre(ServerPolicy):
    """A server whose slice is the centre c.

    A push x moves c by d = moving_rate (x - c), and is answered with x - d.
    """

    def __init__(self, moving_rate: float) -> None:
        self._moving_rate = moving_rate

    def start(self, shard: Tensor, apply: Apply) -> None:
        self._shard = shard
        self._apply = apply
        self._pull = torch.empty_like(shard)  # d, then c + d (P/S,)
        self._answer = torch.empty_like(shard)

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        """Moves c by the push x of a worker, and keeps its answer x - d."""
        torch.sub(flat, self._shard, out=self._pull).mul_(self._moving_rate)
        torch.sub(flat, self._pull, out=self._answer)

        # `Load` is the updater here: what it is given becomes the slice, so it gets c + d.
        self._apply(self._pull.add_(self._shard))

        return [worker]

    def on_goodbye(self, worker: int) -> list[int]:
        return []

    def answer(self, worker: int) -> Tensor:
        return self._answer

    def snapshot(self) -> Tensor:
        return self._shard
