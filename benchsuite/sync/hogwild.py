"""Hogwild: the parameters lie in memory that all workers share, and everybody updates them in place
(Niu et al. 2011).

arXiv 1106.5730, algorithm 1: read the parameters, compute a gradient on one's own batch, add the
step to the shared vector without asking anybody. `lock = none` is that: reads may be torn, and of
two updates of one element at the same moment one may be lost. `lock = exclusive` is the control:
one lock around the step and the next read, so that nothing is ever lost. Each worker keeps an
optimiser of its own and steps with lr/N on batch/N samples, as `asynchronous` does.

Sends 0 bytes on the wire. Keeps the shared vector: M bytes, once for all workers of the host.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from benchsuite import sync
from benchsuite.comm import Comm, Traffic
from benchsuite.compression import Compression
from benchsuite.sync import Events, Setting, Work, hand_out
from benchsuite.topology import Topology
from benchsuite.update import Updater, clip
from benchsuite.workload import Batch, Part, Recipe, Shapes, numel


@dataclass
class Strategy(sync.Strategy):
    """All workers write to one vector of parameters, which their host's memory holds.

    No message is sent; the memory itself is the way to agree.
    """

    lock: Literal["none", "exclusive"] = "none"
    """`exclusive`: one worker at a time reads or writes."""

    lr_rule: Literal["equal_sample", "same"] = "equal_sample"
    """A step is on batch/N samples: `equal_sample` steps with lr/N, `same` with the synchronous
    lr.
    """

    snapshot_of = "replica"
    clips_mean = False
    apart = True

    order = 10
    colour = "#22272e"
    topologies = ("native",)
    topologies_why = (
        "it works on shared memory: its communication is its own, topology = native by definition"
    )
    by_arrival = True
    model_parallel = False
    takes_votes = False
    cpu_only = True
    refuses_compression = "hogwild puts 0 bytes on the wire"
    refuses = (
        {
            "rule": "hogwild",
            "when": "cell.hosts != 1",
            "reason": (
                "hosts = {cell.hosts} with sync = {name}: parameters lie in one host's shared "
                "memory"
            ),
            "remedy": "set hosts = 1",
        },
        {
            "rule": "hogwild",
            "when": 'cell.device != "cpu"',
            "reason": (
                "device = {cell.device} with sync = {name}: its parameters lie in CPU shared memory"
            ),
            "remedy": "set device = cpu",
        },
    )
    payload_source = "counted"

    # -- a run -------------------------------------------------------------------------------------

    def start(
        self, comm: Comm, part: Part, recipe: Recipe, topology: Topology, compression: Compression
    ) -> None:
        self._comm = comm
        self._part = part
        self._recipe = recipe

        self._num_workers = comm.size

        # Shards of the budget in all, and the one that this worker has taken.
        self._num_steps = recipe.budget // recipe.global_batch * self._num_workers
        self._index = 0

        self.events = {"updates": 0}

        # The one vector of parameters, (P,); `part.params` is this worker's last read of it.
        self._shared = comm.shared("hogwild", part.params.numel(), part.params.dtype)
        self._guard: Any = (
            comm.lock("hogwild") if self.lock == "exclusive" else contextlib.nullcontext()
        )

        if comm.rank == 0:
            self._shared.copy_(part.params)

        comm.barrier()  # or a fast worker would step on zeros

        # A step is on batch/N samples, and there are N times as many steps.
        scale = 1 / self._num_workers if self.lr_rule == "equal_sample" else 1.0
        self._updater = Updater(self._shared, recipe, shapes=part.shapes, lr_scale=scale)

    def make_updater(self, params: Tensor) -> Updater:
        # No server is there to be given an updater.
        raise AssertionError("rules: hogwild has no server")

    def next_index(self) -> Work | None:
        self._index, work = hand_out(self._comm, self._num_workers, self._num_steps)
        return work

    def step(self, batch: Batch) -> float:
        """Computes a gradient on this worker's last read, steps the shared vector, reads again."""
        part = self._part
        loss = part.gradient(batch)
        assert loss is not None
        clip(part.grad, self._recipe.clip_norm)

        # Without a lock others step and read at the same time: that is the experiment. The
        # gradient is not computed on the shared vector itself, which would change under it.
        batches_before = self._index // self._num_workers
        with self._guard:
            self._updater.step(part.grad, samples=batches_before * self._recipe.global_batch)
            part.params.copy_(self._shared)

        self.events["updates"] += 1

        return loss

    def finish(self) -> None:
        """Waits for all workers: the vector is nobody's own, and others may still step it."""
        self._comm.barrier()
        self._part.params.copy_(self._shared)

    def snapshot(self) -> Tensor:
        return self._shared

    # -- predictions -------------------------------------------------------------------------------

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        return {"updates": [num_batches] * setting.num_workers}

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        return numel(shapes) * setting.itemsize

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        # Shared memory is no wire.
        return Traffic()
