"""K-sync: the server applies the mean of the first K of N gradients of a version (Dutta et al. 2018; Chen et al. 2016).

With `backup_workers = c`, K = N - c: synchronous training that does not wait for its c slowest. `late = finish`: a
gradient that comes after its version is over is dropped, and its worker is answered with the newest parameters.
Dropped gradients count as used samples. Sends M bytes each way per push, like a parameter server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchsuite.comm import Comm, Traffic
from benchsuite.compression import Compression
from benchsuite.errors import UsageError
from benchsuite.sync import Apply, Events, Setting, Work, count
from benchsuite.topology import Topology, rank_order_sum
from benchsuite.topology.parameter_server import Topology as ParameterServer
from benchsuite.topology.parameter_server import clip_traffic, push_pull_traffic
from benchsuite.update import Updater
from benchsuite.workload import Batch, Part, Recipe, Shapes, numel


@dataclass
class Strategy:
    """The first K gradients of a version make its step."""

    backup_workers: int = 1
    """c: a version is over when N - c gradients are in (0 = synchronous)."""
    late: Literal["finish", "cancel"] = "finish"
    """A gradient whose version is over: `finish` computes it (it is dropped); `cancel`: virtual clock only."""

    survives = "none"
    snapshot_of = "servers"
    clips_mean = True
    needs_topology = ("parameter_server",)

    def start(self, comm: Comm, part: Part, recipe: Recipe, topology: Topology, compression: Compression) -> None:
        assert isinstance(topology, ParameterServer), "rules: k_sync needs parameter_server"
        self._comm, self._part, self._recipe, self._topology = comm, part, recipe, topology
        self._num_workers = topology.num_workers
        if not 0 <= self.backup_workers < self._num_workers:
            raise UsageError(
                f"backup_workers = {self.backup_workers} of {self._num_workers} workers: K = N - c must be at least 1; "
                f"set backup_workers to at most {self._num_workers - 1}"
            )
        self._num_pushes = recipe.budget // recipe.global_batch * self._num_workers
        self._index = 0
        self.events = {"pushes": 0, "replies": 0}

    def make_updater(self, params: Tensor) -> Updater:
        return Updater(params, self._recipe)

    def next_index(self) -> Work | None:
        self._index = self._comm.fetch_add("next batch", 1)
        if self._index >= self._num_pushes:
            return None
        return self._index // self._num_workers, self._index % self._num_workers, self._num_workers

    def step(self, batch: Batch) -> float:
        part = self._part
        loss = part.gradient(batch)
        assert loss is not None
        self._topology.exchange(part.grad, part.params, tag=self._index)
        self.events["pushes"] += 1
        self.events["replies"] += 1
        return loss

    def finish(self) -> None:
        self._topology.goodbye()

    def snapshot(self) -> Tensor:
        return self._part.params

    def policy(self) -> FirstK:
        return FirstK(self._num_workers, self._num_workers - self.backup_workers)

    def num_pushes(self) -> int:
        return self._num_pushes

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        each = [num_batches] * setting.num_workers
        steps = num_batches * setting.num_workers // max(1, setting.num_workers - self.backup_workers)
        return {"pushes": each, "replies": each, "updates": [0] * setting.num_workers + [steps] * setting.num_servers}

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        workers = range(setting.num_workers)
        traffic = push_pull_traffic(
            numel(shapes),
            setting.itemsize,
            pushes=[count(events, "pushes", worker) for worker in workers],
            replies=[count(events, "replies", worker) for worker in workers],
            num_servers=setting.num_servers,
        )
        updates = count(events, "updates", setting.num_workers) if setting.clip else 0
        return traffic + clip_traffic(setting.num_workers, setting.num_servers, updates)


class FirstK:
    """Applies the mean of the first K gradients of a version; later ones of that version are dropped."""

    def __init__(self, num_workers: int, k: int) -> None:
        self._k, self._active = k, set(range(num_workers))
        self.events = {"drops": 0}

    def start(self, shard: Tensor, apply: Apply) -> None:
        self._shard, self._apply = shard, apply
        self._version = 0
        self._slots = {worker: torch.empty_like(shard) for worker in self._active}
        self._mean = torch.empty_like(shard)
        self._arrived: set[int] = set()

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        if version < self._version:
            self.events["drops"] += 1
            return [worker]
        self._slots[worker].copy_(flat)
        self._arrived.add(worker)
        return self._close()

    def on_goodbye(self, worker: int) -> list[int]:
        self._active.discard(worker)
        return self._close()

    def _close(self) -> list[int]:
        """Ends the version when K gradients are in, or all that can still come."""
        if not self._arrived or len(self._arrived) < min(self._k, len(self._active)):
            return []
        arrived = sorted(self._arrived)
        rank_order_sum([self._slots[worker] for worker in arrived], self._mean)
        self._mean.div_(len(arrived))
        self._apply(self._mean, num_gradients=len(arrived))
        self._version += 1
        self._arrived.clear()
        return arrived

    def answer(self, worker: int) -> Tensor:
        return self._shard

    def snapshot(self) -> Tensor:
        return self._shard
