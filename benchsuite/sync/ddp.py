"""torch.nn.parallel.DistributedDataParallel: what a user would pick (Li et al. 2020, PyTorch
Distributed).

This is the library reference beside `synchronous` and, with `local_steps` > 1, beside `local_sgd`:
the same cells, the same columns. Buckets of gradients are all-reduced while the backward pass still
runs. Compressions and local steps are the library's own communication hooks: `fp16`, PowerSGD, and
post-local SGD with its periodic averager. Its hook for bf16 does not run on gloo; ours has three
lines. The library lets PowerSGD begin with the third step at the earliest, and leaves a matrix
alone unless that halves its bytes.

Sends 2 (N-1)/N * M bytes per rank and step, half of it in half precision. The library calls the
backend itself, so bytes are derived from its calls, not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel

from benchsuite import sync
from benchsuite.comm import Comm, Traffic
from benchsuite.compression import Compression
from benchsuite.compression.bf16 import Compression as BFloat16
from benchsuite.compression.fp16 import Compression as Float16
from benchsuite.compression.half import HALF_BYTES
from benchsuite.compression.powersgd import Compression as PowerSGD
from benchsuite.compression.powersgd import columns
from benchsuite.sync import Cycle, Events, Setting, Work, count
from benchsuite.topology import Topology
from benchsuite.update import Updater
from benchsuite.workload import Batch, Part, Recipe, Shapes, numel, views

# Steps before PowerSGD begins: the least that the library takes, because it rebuilds its buckets
# after the first step.
DENSE_STEPS = 2

# A matrix is compressed if its elements are more than so many times those of its factors: the
# library's default.
LEAST_RATE = 2

Hook = Callable[[Any, Any], torch.futures.Future[Tensor]]


@dataclass
class Strategy(sync.Strategy):
    """DistributedDataParallel is put around the module, and the optimiser steps its parameters.

    Unlike elsewhere the optimiser sees the tensors of the module, not one flat vector.
    """

    bucket_cap_mb: int = 25
    """DDP's own option: bytes of a bucket in units of 2**20."""

    local_steps: int = 1
    """H, optimiser steps between two means of the parameters (1 = gradients agree in every
    step).
    """

    warmup_steps: int = 0
    """Synchronous steps before the local ones."""

    clips_mean = True
    payload_source = "derived"
    calls_library = True  # by itself, past `Comm`

    label_with_topology = "DistributedDataParallel"
    short_label_with_topology = "DDP"
    order = 5
    colour = 7
    looks = {"native": (7, 4, 2)}
    topologies = ("native",)
    topologies_why = (
        "DistributedDataParallel calls the backend itself: its communication is its own, topology "
        "= native by definition"
    )
    every_step = True
    model_parallel = False
    takes_votes = False
    agrees_after = "local_steps"
    compressions = ("none", "fp16", "bf16", "powersgd")
    compressions_why = "it has no communication hook for it"
    wall_only = "the library runs by the wall clock"
    at_least = {"bucket_cap_mb": 1}
    refuses = (
        {
            "rule": "compression x sync",
            "when": 'compression.name != "none" and local_steps > 1',
            "reason": (
                "compression = {compression.name} with local_steps = {local_steps:g} of {name}: "
                "it takes one hook, of a compression or of local steps"
            ),
            "remedy": "set local_steps = 1, or compression = none",
        },
    )
    blocked_reason = (
        "all-reduce inside DDP's backward pass: blocked = from the last gradient to its return"
    )

    @property
    def snapshot_of(self) -> str:
        """Says whose parameters are evaluated: with local steps replicas differ between means."""
        return "mean" if self.local_steps > 1 else "replica"

    @property
    def goes_on(self) -> bool:
        """Says that a replica which diverges alone goes on, because others wait for it."""
        return self.local_steps > 1

    # -- a run -------------------------------------------------------------------------------------

    def start(
        self, comm: Comm, part: Part, recipe: Recipe, topology: Topology, compression: Compression
    ) -> None:
        self._comm = comm
        self._part = part
        self._recipe = recipe

        self._rank = comm.rank
        self._num_workers = topology.num_workers

        # Global batches of the budget, and how many of them are done.
        self._steps = recipe.budget // recipe.global_batch
        self._step = 0

        self.events = dict.fromkeys(self._counted, 0)

        # State of the communication hook, and what averages parameters after local steps.
        self._state: Any = None
        self._averager: PeriodicModelAverager | None = None

        part.wrap(lambda module: self._wrapped(module, compression))

        # In the module's order, in which `_average` binds them to the flat vector.
        self._params = [p for p in part.module.parameters() if p.requires_grad]
        self._updater = Updater(self._params, recipe, shapes=part.shapes)

    def _wrapped(self, module: torch.nn.Module, compression: Compression) -> torch.nn.Module:
        """Puts the library around a module, with the hook that the cell asks for."""
        wrapped = DistributedDataParallel(module, bucket_cap_mb=self.bucket_cap_mb)

        # Buffers are constants of a model here (masks, angles), which no other strategy sends.
        wrapped.broadcast_buffers = False

        if self.local_steps > 1:
            # The library's averager takes its first mean right after the first local step; ours
            # comes after H of them, as in `local_sgd`.
            first = self.warmup_steps + self.local_steps - 1
            self._averager = PeriodicModelAverager(self.local_steps, warmup_steps=first)
            self._state = PostLocalSGDState(
                None, None, self.warmup_steps, post_local_gradient_allreduce=False
            )
            wrapped.register_comm_hook(self._state, post_localSGD_hook)
        elif isinstance(compression, Float16):
            # The hooks of half precision keep no state.
            wrapped.register_comm_hook(None, fp16_compress_hook)
        elif isinstance(compression, BFloat16):
            wrapped.register_comm_hook(None, bf16_hook)
        elif isinstance(compression, PowerSGD):
            # It keeps errors and factors from step to step, and counts steps itself.
            self._state = PowerSGDState(
                None,
                compression.rank,
                start_powerSGD_iter=DENSE_STEPS,
                min_compression_rate=LEAST_RATE,
            )

            wrapped.register_comm_hook(self._state, powerSGD_hook)

        return wrapped

    def make_updater(self, params: Tensor) -> Updater:
        # No server is there to be given an updater.
        raise AssertionError("ddp has no server")

    def next_index(self) -> Work | None:
        if self._step == self._steps:
            return None

        return self._step, self._rank, self._num_workers

    def step(self, batch: Batch) -> float:
        """Makes a backward pass, in which the library averages gradients, and a step."""
        loss = self._part.backward(batch)
        if self._recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._params, self._recipe.clip_norm)

        # None: the gradients are where the library has left them, in the parameters.
        self._updater.step(None, samples=self._step * self._recipe.global_batch)
        if self._averager is not None:
            self._average(self._averager)

        self._step += 1
        # In the warm-up gradients agree in every step; after it parameters do, every H steps.
        if self._step <= self._num_gradient_means(self._steps):
            self.events["gradient_means"] += 1
        elif self.local_steps == 1 or (self._step - self.warmup_steps) % self.local_steps == 0:
            self.events["synchronisations"] += 1

        return loss

    def _average(self, averager: PeriodicModelAverager) -> None:
        """Averages the parameters over the workers if it is time to.

        The library's averager gives the parameters new memory. The replica's flat vector would
        then be left behind, so they are copied back into it and bound to it again.
        """
        begin = self._comm.now_ns()
        averager.average_parameters(self._params)

        # The call goes past `Comm`, which would have counted the time.
        self._comm.wait_ns += self._comm.now_ns() - begin

        kept = list(views(self._part.params, self._part.shapes).values())
        if self._params[0].data_ptr() != kept[0].data_ptr():
            # Same order on both sides: `kept` is made from the shapes of these parameters.
            for parameter, view in zip(self._params, kept, strict=True):
                view.copy_(parameter.detach())
                parameter.data = view

    def finish(self) -> None:
        """Nothing is under way after a step."""

    def snapshot(self) -> Tensor:
        return self._part.params

    @property
    def _counted(self) -> list[str]:
        """The names of the events that are counted."""
        if self.local_steps > 1:
            return ["synchronisations", "gradient_means"]

        return ["synchronisations"]

    def _num_gradient_means(self, steps: int) -> int:
        """Says how many of `steps` are synchronous ones before local steps, counted apart."""
        return min(self.warmup_steps, steps) if self.local_steps > 1 else 0

    def cycles(self, num_steps: int) -> list[Cycle]:
        """Says what this run was made of, for those who watch the library do it once more."""
        # First the steps of the warm-up, each with a mean of gradients, then stretches of H steps
        # with one mean of parameters at their end.
        if self.local_steps > 1:
            warmup = self.events["gradient_means"]
            means = self.events["synchronisations"]

            return [
                Cycle(warmup, rewind=lambda: self._rewind(0)),
                Cycle(means, self.local_steps, rewind=lambda: self._rewind(self.warmup_steps)),
            ]

        # PowerSGD sends whole gradients at first.
        steps = self.events["synchronisations"]
        if isinstance(self._state, PowerSGDState):
            dense = min(DENSE_STEPS, steps)
            return [
                Cycle(dense, rewind=lambda: self._rewind(0)),
                Cycle(steps - dense, rewind=lambda: self._rewind(DENSE_STEPS)),
            ]

        return [Cycle(steps)]

    def _rewind(self, step: int) -> None:
        """Sets the library's own counters of steps, so that it does what it did at `step`."""
        self._state.iter = step
        if self._averager is not None:
            self._averager.step = step

    # -- predictions -------------------------------------------------------------------------------

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        # Local steps that are left over at the end of the budget have no mean of their own.
        warmup = self._num_gradient_means(num_batches)
        means = (num_batches - warmup) // self.local_steps
        counts = {"synchronisations": means, "gradient_means": warmup}

        return {name: [counts[name]] * setting.num_workers for name in self._counted}

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        """Says how many bytes the library keeps.

        Its buckets, beside the gradients of the parameters; over half precision the cast vector;
        with PowerSGD the errors, a copy, and the factors; with local steps the averager's vector.
        """
        if setting.num_workers == 1:
            return 0

        whole = numel(shapes) * setting.itemsize
        if isinstance(setting.compression, (Float16, BFloat16)):
            return whole + numel(shapes) * HALF_BYTES

        if isinstance(setting.compression, PowerSGD):
            return 3 * whole + setting.itemsize * compressed_numel(shapes, setting.compression.rank)

        return 2 * whole if self.local_steps > 1 else whole

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        # All ranks take part in every call of the library: the largest count is everybody's.
        ranks = range(setting.num_workers)
        means = max(count(events, "synchronisations", worker) for worker in ranks)
        dense = max(count(events, "gradient_means", worker) for worker in ranks)
        itemsize = setting.itemsize
        size = numel(shapes)

        if isinstance(setting.compression, PowerSGD):
            # The first steps send the whole gradient, all others factors and what is left alone.
            dense = min(DENSE_STEPS, means)
            sent = _all_reduce(
                setting, compressed_numel(shapes, setting.compression.rank), itemsize
            )
            return _all_reduce(setting, size, itemsize).times(dense) + sent.times(means - dense)

        # A mean of gradients and one of parameters have the same size.
        if isinstance(setting.compression, (Float16, BFloat16)):
            itemsize = HALF_BYTES

        return _all_reduce(setting, size, itemsize).times(dense + means)


def bf16_hook(group, bucket):  # type: ignore[no-untyped-def]  # DDP looks at the argument's name, and refuses hints as text
    """Starts the mean of a bucket in bfloat16, and returns its future.

    It divides before the sum, as the library's own hooks do: a sum of N gradients could be out of
    the range of a narrower format.
    """
    short = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size(group))
    reduced = dist.all_reduce(short, group=group, async_op=True).get_future()

    return reduced.then(lambda future: bucket.buffer().copy_(future.value()[0]))


def compressed_numel(shapes: Shapes, rank: int) -> int:
    """Says how many elements the library's PowerSGD sends per step.

    A matrix n x m travels as two factors of `rank` columns where they have less than half of its
    elements, and as it is otherwise; so do vectors, for which m = 1.
    """
    total = 0

    for shape in shapes.values():
        n, m = (shape[0], columns(shape)) if shape else (1, 1)
        factors = min(n, m, rank) * (n + m)  # P (n, r) and Q (m, r)
        total += factors if factors * LEAST_RATE < n * m else n * m

    return total


def _all_reduce(setting: Setting, size: int, itemsize: int) -> Traffic:
    """Predicts the traffic of one all-reduce of `size` elements over the workers."""
    return setting.topology.predicted_traffic(size, itemsize, num_workers=setting.num_workers)
