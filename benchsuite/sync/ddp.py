"""torch.nn.parallel.DistributedDataParallel: what a user would pick (Li et al. 2020, PyTorch Distributed).

The library reference beside `synchronous`: same cells, same columns. Buckets of gradients are all-reduced while
the backward pass still runs. Sends 2 (N-1)/N * M bytes per rank and step; derived, not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchsuite.comm import Comm, Traffic
from benchsuite.compression import Compression
from benchsuite.sync import Events, Setting, Work, count
from benchsuite.topology import Topology
from benchsuite.update import Updater
from benchsuite.workload import Batch, Part, Recipe, Shapes, numel


@dataclass
class Strategy:
    """DistributedDataParallel around the module; the optimiser on its parameters, tensor by tensor."""

    bucket_cap_mb: int = 25
    """DDP's own option: bytes of a bucket in units of 2**20."""

    survives = "none"
    snapshot_of = "replica"
    clips_mean = True
    needs_topology = ("native",)
    payload_source = "derived"
    calls_library = True  # by itself, past `Comm`
    blocked_reason = "all-reduce inside DDP's backward pass: blocked = from the last gradient to its return"

    def start(self, comm: Comm, part: Part, recipe: Recipe, topology: Topology, compression: Compression) -> None:
        self._part, self._recipe = part, recipe
        self._rank, self._num_workers = comm.rank, topology.num_workers
        self._steps, self._step = recipe.budget // recipe.global_batch, 0
        self.events = {"synchronisations": 0}
        part.wrap(lambda module: DistributedDataParallel(module, bucket_cap_mb=self.bucket_cap_mb))
        self._params = [p for p in part.module.parameters() if p.requires_grad]
        self._updater = Updater(self._params, recipe)

    def make_updater(self, params: Tensor) -> Updater:
        raise AssertionError("ddp has no server")

    def next_index(self) -> Work | None:
        if self._step == self._steps:
            return None
        return self._step, self._rank, self._num_workers

    def step(self, batch: Batch) -> float:
        loss = self._part.backward(batch)
        if self._recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._params, self._recipe.clip_norm)
        self._updater.step(None, samples=self._step * self._recipe.global_batch)
        self._step += 1
        self.events["synchronisations"] += 1
        return loss

    def finish(self) -> None:
        """Nothing is under way after a step."""

    def snapshot(self) -> Tensor:
        return self._part.params

    def policy(self) -> None:
        return None

    def num_pushes(self) -> int:
        return 0

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        return {"synchronisations": [num_batches] * setting.num_workers}

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        """The library's buckets, beside the gradients of the parameters."""
        return numel(shapes) * setting.itemsize if setting.num_workers > 1 else 0

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        steps = max(count(events, "synchronisations", worker) for worker in range(setting.num_workers))
        return setting.compression.predicted_traffic(
            shapes, setting.itemsize, setting.topology, num_workers=setting.num_workers
        ).times(steps)
