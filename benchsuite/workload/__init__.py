"""What is trained (`Workload`) and what a rank holds of it (`Part`).

A workload knows nothing of ranks: it is a model as a chain of layers, data that any worker can be
handed, a loss, an evaluation, a target. `parallel/` makes a `Part` of it on each rank.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchsuite.comm import Handle
from benchsuite.plan.target import Target
from benchsuite.workload.muon_optimizer import muon

# what a workload file needs
__all__ = ["Batch", "Infer", "Part", "Ready", "Recipe", "Shapes", "Target", "Workload", "muon"]

# Parameter name -> shape, in the order of the flat vector.
Shapes = Mapping[str, torch.Size]

# The model without gradient: inputs to outputs.
Infer = Callable[[Tensor], Tensor]

# Is told (start, stop) of each slice of the gradient that is final.
Ready = Callable[[int, int], None]


@dataclass(frozen=True)
class Batch:
    """Samples that one gradient is computed on.

    x is what the model sees and y what the loss compares its output with: tensors, or tuples, lists
    and mappings of tensors, whose dimension 0 counts the samples.
    """

    x: Any
    y: Any
    num_samples: int


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """Cuts a batch along dimension 0 into `count` equal pieces, which are views of it."""
    if count == 1:
        return [batch]

    if batch.num_samples % count:
        raise ValueError(
            f"{batch.num_samples} samples cannot be cut into {count} equal micro-batches"
        )

    size = batch.num_samples // count
    return [
        Batch(_piece(batch.x, at, count), _piece(batch.y, at, count), size) for at in range(count)
    ]


def _piece(value: Any, at: int, count: int) -> Any:
    """Returns piece `at` of `count` of a batch's x or y, every tensor in it cut alike."""

    def cut(whole: Tensor) -> Tensor:
        """Returns the rows of the piece, a view."""
        length = len(whole) // count
        return whole[at * length : (at + 1) * length]

    return mapped(value, cut)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch's x or y with every tensor in it changed.

    It is a tensor, or tuples, lists and mappings of tensors, however deep; what is no tensor stays
    as it is.
    """
    if isinstance(value, Tensor):
        return change(value)

    if isinstance(value, (tuple, list)):
        inside = [mapped(each, change) for each in value]

        # A named tuple takes its fields one by one, other sequences take a list.
        return type(value)(*inside) if hasattr(value, "_fields") else type(value)(inside)

    if isinstance(value, Mapping):
        return {name: mapped(each, change) for name, each in value.items()}

    return value


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; what is there already stays.

    From the host it goes by pinned memory, without waiting: the step that reads it is queued behind
    the copy.
    """
    if device.type == "cpu":
        return batch

    def moved(value: Tensor) -> Tensor:
        """Moves one tensor. Only from pinned memory does the copy not wait."""
        if value.device == device:
            return value

        return value.pin_memory().to(device, non_blocking=True)

    return Batch(mapped(batch.x, moved), mapped(batch.y, moved), batch.num_samples)


class DeviceLoss(float):
    """A loss that is still on the device: `read` waits for it.

    Strategies hand it on unread, so that no step waits for the device; as a number it is NaN.
    """

    tensor: Tensor

    def __new__(cls, tensor: Tensor) -> DeviceLoss:
        """A float must get its value when it is made: NaN shows whoever forgot to `read`."""
        loss = super().__new__(cls, math.nan)
        loss.tensor = tensor

        return loss

    def read(self) -> float:
        """The loss as a number; waits until the device has computed it."""
        return float(self.tensor)


def read_loss(loss: float) -> float:
    """A step's loss as a number; waits for the device where it is still there."""
    return loss.read() if isinstance(loss, DeviceLoss) else loss


@dataclass(frozen=True)
class Recipe:
    """How a workload is trained.

    The learning rate is a function of progress = samples consumed / budget, so it is the same
    schedule for every strategy, however many samples it takes per step.
    """

    # Takes tensors; where `elementwise` is False, (name, tensor) pairs.
    make_optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer]

    lr: Callable[[float], float]
    global_batch: int
    budget: int  # samples
    clip_norm: float | None = None  # largest norm of the whole gradient; None does not clip

    # The optimiser treats every element alike, so it may work on a flat vector or a slice of it.
    elementwise: bool = True

    def optimizer_of(self, named: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """Makes the optimiser of whole tensors, for who steps no flat vector."""
        return self.make_optimizer(named.values() if self.elementwise else named.items())


class Workload(Protocol):
    """What is trained: one file in `workloads/`, a dataclass that inherits from this class.

    Its fields are its options; the module's `presets` say what its named settings set.
    """

    @property
    def target(self) -> Target:
        """The metric, and the values of it that count as reached."""

    collects: bool = False
    """Whether batches come from acting: the workload is a `RolloutWorkload` then."""

    data_sha256: str = ""
    """Hash of the data where they are the user's or this Python's, so that runs can be told apart;
    empty where the suite makes the data."""

    def layer_flops(self) -> list[int] | None:
        """Counts the forward operations of each layer for one sample; None: not worked out."""
        return None

    def place(self, device: torch.device) -> None:
        """Moves data that are kept in memory to a device, so that no step waits for them."""
        return

    def start(self, *, seed: int, dtype: torch.dtype) -> None:
        """Loads data and fixes every random stream. Called once before anything else."""

    def layers(self) -> list[nn.Module]:
        """Builds the model as a chain of layers, on the CPU.

        The suite seeds torch before it calls (`seeded_layers`), so nothing is seeded here.
        """

    def tensor_plan(self) -> Mapping[str, str]:
        """Says how modules split by weight: their names in `nn.Sequential(*layers)` -> how.

        {}: the workload does not split. "columns": by its outputs, a matrix or a convolution;
        "rows": by its inputs, behind columns; "gathered": by its outputs, which are put together at
        once; "channels": a GroupNorm between columns and rows; "tokens": a norm of tokens, of which
        it sees a slice under `sequence_parallel`. The class says what the parts must divide,
        numbers or names of options (`tensor_divides = ("width",)`), and which option counts tokens,
        dimension 1 of an activation (`tensor_tokens`).
        """

    def recipe(self) -> Recipe:
        """Says with what optimiser, schedule, clipping, batch and budget one process trains."""

    def batch(self, index: int, *, shard: int, num_shards: int) -> Batch:
        """Returns slice `shard` of `num_shards` of global batch `index`.

        It depends on the seed and these three numbers alone, not on what was asked for before.
        """

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """The mean loss over the batch, a scalar that carries its graph.

        A mean and not a sum, so that gradients of equal shares may be averaged.
        """

    def evaluate(self, infer: Infer) -> float:
        """The metric on the held-out set, once over every sample.

        `infer` is the model as the strategy has it now, whole or divided over ranks.
        """


@dataclass(frozen=True)
class TrajectoryShape:
    """Shapes and types of a worker's trajectory as a batch, known before there is one.

    A learner makes room for it by these before the first trajectory comes.
    """

    x: tuple[int, ...]
    y: tuple[int, ...]
    x_dtype: torch.dtype
    y_dtype: torch.dtype
    num_samples: int

    @property
    def num_bytes(self) -> int:
        """Bytes of x and y together."""
        x_bytes = math.prod(self.x) * self.x_dtype.itemsize
        y_bytes = math.prod(self.y) * self.y_dtype.itemsize

        return x_bytes + y_bytes


class Rollout(Protocol):
    """What a worker has collected: minibatches of it, in the order in which it is trained on."""

    def statistics(self) -> Tensor:
        """Returns the sum, the sum of squares and the number of each minibatch's advantages.

        (minibatches, 3) in float64: those of several workers can be added.
        """

    def batch(self, position: int, statistics: Tensor) -> Batch:
        """Returns minibatch `position`; by `statistics` (3,) its advantages are normalised."""


class RolloutWorkload(Workload, Protocol):
    """A workload whose batches come from acting (reinforcement learning).

    It says `collects = True`, and its `batch` is never called.
    """

    per_rollout: int  # minibatches, one step of a strategy each
    rollout_steps: int  # of each environment

    def environments(self, *, shard: int, num_shards: int) -> Any:
        """Makes a worker's own environments, at their first starts.

        Whoever owns them keeps them from rollout to rollout.
        """

    def collect(self, act: Infer, environments: Any, number: int) -> Rollout:
        """Plays rollout `number` of these environments by the policy `act`."""

    def trajectory(self, act: Infer, environments: Any, number: int, batches: int) -> Batch:
        """Plays as many environment steps as so many minibatches stand for.

        They stay in order, with what the loss of another policy than the one that acted needs.
        """

    def trajectory_shape(
        self, batches: int, *, num_shards: int, dtype: torch.dtype
    ) -> TrajectoryShape:
        """Says the shapes and types of what `trajectory` returns for so many minibatches."""


class Part(Protocol):
    """What one rank holds of the model: `params` and `grad` are flat vectors with named views."""

    module: nn.Module
    shapes: Shapes
    params: Tensor  # (P,)
    grad: Tensor  # (P,)

    goes_on: bool = False
    """Whether the part goes on when its parameters are not finite any more: others wait for it."""

    has_grad_buffer: bool = False
    """Whether `use_grad_buffer` can move the gradient into other memory."""

    def use_grad_buffer(self, buffer: Tensor) -> None:
        """Lets `grad` live in `buffer`. Only where `has_grad_buffer`."""
        raise AssertionError(f"{type(self).__name__} has no such memory: has_grad_buffer is False")

    def gradient_norm(self) -> float | None:
        """Norm of the replica's whole gradient, where `grad` is only a part of it; else None."""
        return None

    def finite(self) -> bool:
        """Whether all parameters of the replica are finite."""
        return bool(torch.isfinite(self.params).all())

    def infer(self, x: Tensor) -> Tensor:
        """Runs x forward without gradient; the result stands on every rank of the replica."""

    def gradient(
        self, batch: Batch, ready: Ready | None = None, until: Handle | None = None
    ) -> float | None:
        """Fills `grad` with the gradient of the mean loss, never steps; returns the loss.

        `ready(start, stop)` is called for slices of `grad` in backward order as they become final.
        `until`: when it completes first the gradient is abandoned and None returned (virtual clock
        only).
        """

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> None:
        """Puts a library's wrapper around the module that `backward` calls (ddp only)."""

    def backward(self, batch: Batch) -> float:
        """Calls `loss.backward()` through the wrapped module (ddp only).

        Gradients are left in the parameters' own `.grad`, where the wrapper puts them.
        """


# torch has one random state for all threads. Thread ranks take turns where a workload may draw from
# it, or the order of threads would decide which rank gets which numbers.
global_random_state = threading.RLock()


def seeded_layers(workload: Workload, seed: int) -> list[nn.Module]:
    """Builds `workload.layers()` on the CPU, with torch's random state set from the seed.

    The state is put back after it. Generators of other devices are left alone.
    """
    with global_random_state, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return workload.layers()


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What the flat vector holds, in its order.

    Frozen parameters are left out, and a parameter that several layers share stands once, under the
    first of its names.
    """
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def numel(shapes: Shapes) -> int:
    """P, the number of elements of the flat vector."""
    return sum(shape.numel() for shape in shapes.values())


def views(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Returns named views into a flat vector (P,), which shares its memory with all of them."""
    pieces = flat.split([shape.numel() for shape in shapes.values()])
    return {
        name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


def pieces_of(shapes: Shapes, start: int = 0, stop: int | None = None) -> list[int]:
    """Sizes of the tensors' parts in the range [start, stop) of the flat vector.

    Tensors outside of the range are left out, so no size is 0.
    """
    pieces = []
    at = 0

    for shape in shapes.values():
        low = max(at, start)
        high = at + shape.numel() if stop is None else min(at + shape.numel(), stop)
        if high > low:
            pieces.append(high - low)

        at += shape.numel()

    return pieces
