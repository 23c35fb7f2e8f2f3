"""Local SGD, post-local form: H optimiser steps on each replica, then the mean of the parameters
(Lin et al. 2020).

"Don't Use Large Mini-Batches, Use Local SGD", arXiv 1808.07217, equation 2 and section 3:
p_i <- p_i - lr g_i(p_i) for H steps, then p = (1/N) sum p_i. The first `warmup_steps` steps are
synchronous (post-local). With H = 1 and SGD it is `synchronous`. Over a compression the differences
p_i - p since the last agreement travel, never parameters. A parameter server only averages.

Sends one mean of M bytes every H steps: 1/H of what `synchronous` sends. Keeps nothing beside
parameters and optimiser; over a compression M bytes, on a server N M/S + M/S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchsuite import sync
from benchsuite.comm import Comm, Traffic
from benchsuite.compression import Compression
from benchsuite.sync import Events, Setting, Work, count
from benchsuite.sync.averaging import Averager, averaging_server_bytes, is_compressed, means_traffic
from benchsuite.sync.synchronous import ServerMean
from benchsuite.topology import Topology
from benchsuite.update import Load, Updater, clip_part
from benchsuite.workload import Batch, Part, Recipe, Shapes, numel


@dataclass
class Strategy(sync.Strategy):
    """Replicas step alone, and agree every H steps.

    Between two agreements nothing travels, and replicas differ.
    """

    local_steps: int = 8
    """H, optimiser steps between two agreements."""

    warmup_steps: int = 0
    """Synchronous steps at the beginning."""

    momentum: Literal["local", "averaged", "reset"] = "local"
    """What an agreement does to the optimiser's vectors: nothing, their mean too, or a fresh
    start.
    """

    timing_free = True
    snapshot_of = "mean"
    clips_mean = False
    goes_on = True

    label = "local SGD"
    order = 4
    colour = 5
    topologies = ("collective", "server")
    topologies_why = "every replica's vector enters one mean; {topology.called} has no such mean"
    takes_votes = False
    agrees_after = "local_steps"
    refuses = (
        {
            "rule": "compression x sync",
            "when": 'compression.name != "none" and momentum == "averaged"',
            "reason": (
                "compression = {compression.name} with momentum = averaged of {name}: momentum "
                "is no difference"
            ),
            "remedy": "set momentum = local or reset, or compression = none",
        },
        {
            "rule": "compression x sync",
            "when": "compression.feedback and warmup_steps != 0",
            "reason": (
                "compression = {compression.name} with warmup_steps = {warmup_steps:g} of "
                "{name}: what the gradients left over would be added to differences of "
                "parameters"
            ),
            "remedy": (
                "set warmup_steps = 0, or compression to one without error feedback: fp16, bf16, "
                "int8"
            ),
        },
    )

    # -- a run -------------------------------------------------------------------------------------

    def start(
        self, comm: Comm, part: Part, recipe: Recipe, topology: Topology, compression: Compression
    ) -> None:
        self._part = part
        self._recipe = recipe
        self._topology = topology

        self._rank = comm.rank
        self._num_workers = topology.num_workers

        # Global batches of the budget, and how many of them are done.
        self._steps = recipe.budget // recipe.global_batch
        self._step = 0

        self.events = {"synchronisations": 0, "gradient_means": 0, "state_means": 0}
        if comm.rank < self._num_workers:
            self._updater = Updater(part.params, recipe, shapes=part.shapes)
            self._average = Averager(topology, compression)

            # p of the last agreement (P,), where differences travel.
            self._agreed = part.params.clone() if self._average.differences_only else None

    def make_updater(self, params: Tensor) -> Load:
        return Load(params)

    def next_index(self) -> Work | None:
        # Every worker has its own shard of the next global batch.
        if self._step == self._steps:
            return None

        return self._step, self._rank, self._num_workers

    def step(self, batch: Batch) -> float:
        """Makes one step of this replica, then agrees if it is time to."""
        loss = self._part.gradient(batch)
        assert loss is not None

        # Local steps made so far; below 0 the warm-up is not over, and gradients agree.
        local = self._step - self.warmup_steps

        if local < 0:
            self._average(self._part.grad)
            self.events["gradient_means"] += 1

        clip_part(self._part, self._recipe.clip_norm)
        self._updater.step(self._part.grad, samples=self._step * self._recipe.global_batch)
        if local >= 0 and self.is_due(local + 1):
            self._agree()

        self._step += 1

        return loss

    def is_due(self, local_steps: int) -> bool:
        """Says whether replicas agree after so many local steps.

        A strategy of one's own may inherit from this one and override nothing but this. It must
        say the same on every rank.
        """
        return local_steps % self.local_steps == 0

    def _agree(self) -> None:
        """Replaces every replica's parameters p_i by their mean p, and treats the momentum."""
        params = self._part.params  # (P,)

        if self._agreed is None:
            self._average(params)
        else:
            # All replicas know the same p, and the mean of their differences moves it alike on
            # all of them.
            params.sub_(self._agreed)
            self._average(params)
            self._agreed.add_(params)
            params.copy_(self._agreed)

        self.events["synchronisations"] += 1
        # What becomes of the optimiser's vectors is a choice of its own.
        if self.momentum == "averaged":
            for vector in self._updater.state():
                self._average(vector)

            self.events["state_means"] += 1
        elif self.momentum == "reset":
            self._updater.forget_state()

    def finish(self) -> None:
        self._average.goodbye()

    def snapshot(self) -> Tensor:
        return self._part.params

    def policy(self) -> ServerMean:
        # A server only averages: replicas step by themselves.
        return ServerMean(self._num_workers)

    def num_pushes(self) -> int:
        # At most one mean per step, in which every worker pushes once.
        return self._steps * self._num_workers

    # -- predictions -------------------------------------------------------------------------------

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        # `is_due` is asked, not H: a strategy that overrides it is predicted as well.
        warm = min(self.warmup_steps, num_batches)
        agreements = sum(self.is_due(step) for step in range(1, num_batches - warm + 1))
        states = agreements if self.momentum == "averaged" else 0
        counts = {"synchronisations": agreements, "gradient_means": warm, "state_means": states}

        return {name: [number] * setting.num_workers for name, number in counts.items()}

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        # A worker keeps p of the last agreement only where differences travel.
        if server:
            return averaging_server_bytes(shapes, setting)

        return numel(shapes) * setting.itemsize if is_compressed(setting.compression) else 0

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        # A mean of gradients (warm-up) and one of parameters have the same size.
        times = sum(count(events, name, 0) for name in ("synchronisations", "gradient_means"))
        traffic = means_traffic(shapes, times, setting)

        # The optimiser's vectors travel as they are, one mean for each.
        if states := count(events, "state_means", 0):
            for length in setting.state_vectors(shapes):
                traffic += means_traffic({"state": torch.Size([length])}, states, setting)

        return traffic
