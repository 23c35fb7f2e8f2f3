"""Synchronous update: every replica waits for the mean gradient of all (the article's section
3.2.1; Chen et al. 2016).

g = (1/N) sum g_i, where g_i is the gradient of the mean loss on shard i; then one optimiser step,
the same on every replica. Over a collective each replica steps itself. Over a parameter server the
server steps when all N pushes of a version are in, and answers everybody. Both equal one process
on the concatenated batch. `bucket_mib` overlaps a collective with the backward pass: the gradient
is cut into buckets that travel as they come.

Sends per step what one mean of M bytes costs on its topology: a ring 2 (N-1)/N * M per rank, a
server 2 N M in all. Keeps nothing on a worker; a server keeps a slot per worker and their mean,
(N + 1) M / S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite import sync
from benchsuite.comm import Comm, Traffic
from benchsuite.compression import Compression
from benchsuite.sync import Apply, Events, ServerPolicy, Setting, Work, count
from benchsuite.sync.averaging import averaging_server_bytes
from benchsuite.sync.buckets import Buckets, buckets_traffic
from benchsuite.sync.push_pull import push_pull_traffic
from benchsuite.topology import Topology, lend_memory, rank_order_sum
from benchsuite.topology.parameter_server import Topology as ParameterServer
from benchsuite.topology.parameter_server import clip_traffic
from benchsuite.update import Updater, clip_part
from benchsuite.workload import Batch, Part, Recipe, Shapes


@dataclass
class Strategy(sync.Strategy):
    """All replicas agree after every step."""

    bucket_mib: float = 0.0
    """MiB of a bucket that sets out during the backward pass (0 = the whole gradient after it)."""

    timing_free = True
    snapshot_of = "replica"
    clips_mean = True

    short_label = "sync"
    order = 0
    colour = 0
    compressed_colour = 9
    looks = {"parameter_server": (2, 1, 1), "ring": (0, 0, 0), "native": (9, 2, 2)}
    topologies = ("collective", "server")
    topologies_why = "every replica's vector enters one mean; {topology.called} has no such mean"
    every_step = True
    refuses = (
        {
            "rule": "buckets",
            "when": "bucket_mib and parallel.divides",
            "reason": (
                "bucket_mib = {bucket_mib:g} with parallel = {parallel.name}: the library's "
                "backward pass does not say which slices of the gradient are final"
            ),
            "remedy": "set bucket_mib = 0, or parallel = data",
        },
        {
            "rule": "compression x sync",
            "when": 'compression.name != "none" and bucket_mib > 0',
            "reason": (
                "compression = {compression.name} with bucket_mib = {bucket_mib:g} of {name}: "
                "buckets travel as they are"
            ),
            "remedy": "set bucket_mib = 0, or compression = none",
        },
        {
            "rule": "buckets",
            "when": "not 0 <= bucket_mib < 1e300",
            "reason": (
                "bucket_mib = {bucket_mib:g}: MiB of a bucket, or 0 for the whole gradient at once"
            ),
            "remedy": "set bucket_mib = 0, or e.g. 25",
        },
        {
            "rule": "buckets",
            "when": 'bucket_mib > 0 and topology.kind == "server"',
            "reason": (
                "bucket_mib = {bucket_mib:g} with topology = {topology.name}: a push is whole, "
                "and a server steps once for it"
            ),
            "remedy": "set bucket_mib = 0, or topology to a collective",
        },
    )

    # -- a run -------------------------------------------------------------------------------------

    def start(
        self, comm: Comm, part: Part, recipe: Recipe, topology: Topology, compression: Compression
    ) -> None:
        self._part = part
        self._recipe = recipe
        self._topology = topology
        self._compression = compression

        self._rank = comm.rank
        self._num_workers = topology.num_workers
        self._server = topology if isinstance(topology, ParameterServer) else None

        # Global batches of the budget, and how many of them are done.
        self._steps = recipe.budget // recipe.global_batch
        self._step = 0

        self.events = {"synchronisations": 0}

        # Over servers they step, and the replica only loads their answers.
        self._updater = None if self._server else Updater(part.params, recipe, shapes=part.shapes)
        self._buckets = Buckets(comm, part, topology, self.bucket_mib) if self.bucket_mib else None
        if self._buckets is None:
            lend_memory(topology, part)

    def make_updater(self, params: Tensor) -> Updater:
        return Updater(params, self._recipe)

    def next_index(self) -> Work | None:
        if self._step == self._steps:
            return None

        return self._step, self._rank, self._num_workers

    def step(self, batch: Batch) -> float:
        """Makes one step of all replicas, on the mean g of their gradients g_i (P,)."""
        part = self._part
        if self._buckets is None:
            loss = part.gradient(batch)
        else:
            loss = self._overlapped(self._buckets, batch)
        assert loss is not None

        if self._server is not None:
            # Push the gradient, pull the parameters: the server clips and steps.
            self._server.exchange(part.grad, part.params, tag=self._step)
        else:
            assert self._updater is not None

            # With buckets the mean was made during the backward pass.
            if self._buckets is None:
                self._compression.mean(part.grad, self._topology)

            clip_part(part, self._recipe.clip_norm)
            self._updater.step(part.grad, samples=self._step * self._recipe.global_batch)

        self._step += 1
        self.events["synchronisations"] += 1

        return loss

    def _overlapped(self, buckets: Buckets, batch: Batch) -> float | None:
        """Computes the gradient and, meanwhile, the means of its buckets."""
        try:
            return self._part.gradient(batch, buckets.ready)
        except BaseException:
            # A loss that is not finite raises on every rank in the same step, and all buckets are
            # on the wire by then: this synchronisation counts.
            self.events["synchronisations"] += 1
            raise
        finally:
            buckets.wait()

    def finish(self) -> None:
        if self._server is not None:
            self._server.goodbye()

    def snapshot(self) -> Tensor:
        return self._part.params

    def policy(self) -> ServerMean:
        return ServerMean(self._num_workers)

    def num_pushes(self) -> int:
        return self._steps * self._num_workers

    # -- predictions -------------------------------------------------------------------------------

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        return {"synchronisations": [num_batches] * setting.num_workers}

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        # Buckets are views of the gradient: they keep nothing of their own.
        return averaging_server_bytes(shapes, setting) if server else 0

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        # By worker: a run that ended early may have left some of them one step behind.
        steps = [count(events, "synchronisations", worker) for worker in range(setting.num_workers)]
        if setting.num_servers:
            traffic = push_pull_traffic(shapes, setting, pushes=steps, replies=steps)
            return traffic + clip_traffic(
                setting.num_workers, setting.num_servers, max(steps) if setting.clip else 0
            )

        # Over a collective all ranks take part in every mean, so the count is the same for all.
        if self.bucket_mib:
            step = buckets_traffic(
                setting.topology,
                shapes,
                setting.itemsize,
                self.bucket_mib,
                num_workers=setting.num_workers,
            )

            return step.times(max(steps))

        one = setting.compression.predicted_traffic(
            shapes, setting.itemsize, setting.topology, num_workers=setting.num_workers
        )

        return one.times(max(steps))


class ServerMean(ServerPolicy):
    """A server that waits for all N pushes of a version and applies their mean.

    It adds them in rank order, whoever came first, divides once, applies, and answers all. With
    `Load` as its updater it only averages.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers

    def start(self, shard: Tensor, apply: Apply) -> None:
        self._shard = shard
        self._apply = apply
        # A push is kept until the last one is in, so that the order of addition is fixed.
        self._slots = [torch.empty_like(shard) for _ in range(self._num_workers)]
        self._mean = torch.empty_like(shard)
        self._arrived: set[int] = set()

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        """Keeps a push (P/S,); the last one of a version makes the step."""
        self._slots[worker].copy_(flat)
        self._arrived.add(worker)

        if len(self._arrived) < self._num_workers:
            return []

        # The last push of the version is in.
        rank_order_sum(self._slots, self._mean)
        self._mean.div_(self._num_workers)
        self._apply(self._mean, num_gradients=self._num_workers)
        self._arrived.clear()

        return list(range(self._num_workers))

    def on_goodbye(self, worker: int) -> list[int]:
        # All workers make the same number of steps, so nobody waits when one leaves.
        return []

    def answer(self, worker: int) -> Tensor:
        return self._shard

    def snapshot(self) -> Tensor:
        return self._shard
