"""Delayed averaging, Pipe-SGD: the mean of step k-1 travels while step k is computed (Li et al.
2018).

"Pipe-SGD: A Decentralized Pipelined SGD Framework", arXiv 1811.03619, algorithm 1 with width K = 2:
g_k is computed on parameters that know the means up to g_(k-2); then the mean of g_(k-1) is
applied. Step 0 applies nothing, and the last step waits for its own mean as well. Every update but
the first is exactly one version stale, on every replica alike.

Sends per step what `synchronous` sends; the exchange is hidden behind the gradient where it is the
shorter of the two. Keeps M bytes: the gradient that is under way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite import sync
from benchsuite.comm import Comm, Handle, Traffic
from benchsuite.compression import Compression
from benchsuite.sync import Events, Setting, Work, count
from benchsuite.sync.averaging import means_traffic
from benchsuite.topology import Topology
from benchsuite.update import Updater, clip
from benchsuite.workload import Batch, Part, Recipe, Shapes, numel


@dataclass
class Strategy(sync.Strategy):
    """Each step applies the mean gradient of the step before it.

    So the exchange has the whole time of a gradient to be done in.
    """

    alone_is_plain = False
    timing_free = True
    snapshot_of = "replica"
    clips_mean = True

    order = 8
    colour = "#7d7d1f"
    topologies = ("collective",)
    topologies_why = "the mean of step k-1 travels during step k, on every rank alike"
    model_parallel = False
    takes_votes = False
    lag_by_one = True

    # -- a run -------------------------------------------------------------------------------------

    def start(
        self, comm: Comm, part: Part, recipe: Recipe, topology: Topology, compression: Compression
    ) -> None:
        self._comm = comm
        self._part = part
        self._recipe = recipe
        self._compression = compression

        self._rank = comm.rank
        self._num_workers = topology.num_workers

        # Global batches of the budget, and how many of them are done.
        self._steps = recipe.budget // recipe.global_batch
        self._step = 0

        self.events = {"synchronisations": 0}
        self._updater = Updater(part.params, recipe, shapes=part.shapes)

        # The gradient whose mean is being made (P,), and what to wait for.
        self._travelling = torch.empty_like(part.params)
        self._under_way: Handle | None = None

        # The lane has a topology of its own, made at the first mean from the one given here.
        self._topology: Topology | None = None
        self._make_topology = topology

    def make_updater(self, params: Tensor) -> Updater:
        # No server is there to be given an updater.
        raise AssertionError("rules: delayed needs a collective")

    def next_index(self) -> Work | None:
        # Every worker has its own shard of the next global batch.
        if self._step == self._steps:
            return None

        return self._step, self._rank, self._num_workers

    def step(self, batch: Batch) -> float:
        """Computes g_k while the mean of g_(k-1) travels, then applies that mean."""
        loss = self._part.gradient(batch)  # g_k (P,)
        assert loss is not None

        self._apply_what_travels()  # the mean of g_(k-1)

        # A copy, because the next backward pass writes into the gradient while this one travels.
        self._travelling.copy_(self._part.grad)
        self._under_way = self._comm.lane(self._mean)
        self.events["synchronisations"] += 1
        self._step += 1

        # The last mean has no step behind which it could hide.
        if self._step == self._steps:
            self._apply_what_travels()

        return loss

    def _apply_what_travels(self) -> None:
        """Waits for the mean of the step before and makes the optimiser step with it.

        The learning rate is that of the samples after which the gradient was computed.
        """
        # Nothing travels in step 0.
        if self._under_way is None:
            return

        self._under_way.wait()
        self._under_way = None

        clip(self._travelling, self._recipe.clip_norm)
        steps_before = self.events["synchronisations"] - 1
        self._updater.step(self._travelling, samples=steps_before * self._recipe.global_batch)

    def _mean(self, lane: Comm) -> None:
        """Makes, on the second lane, the mean of the gradient that travels."""
        # Made here, because the lane's group is known only on the lane.
        if self._topology is None:
            self._topology = self._make_topology.second()
            self._topology.start(lane)

        self._compression.mean(self._travelling, self._topology)

    def finish(self) -> None:
        """Waits for what travels: nothing, unless the run diverged before its last step."""
        if self._under_way is not None:
            self._under_way.wait()

    def snapshot(self) -> Tensor:
        return self._part.params

    # -- predictions -------------------------------------------------------------------------------

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        # One mean per step: the last is waited for by itself, but it is no additional one.
        return {"synchronisations": [num_batches] * setting.num_workers}

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        return numel(shapes) * setting.itemsize  # the gradient that travels

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        # A lane's bytes are counted like any others.
        return means_traffic(shapes, count(events, "synchronisations", 0), setting)
