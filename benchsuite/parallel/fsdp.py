"""Sharded state: every part of a replica keeps a slice of each parameter and computes on a share of
its batch.

torch.distributed.fsdp.fully_shard (FSDP2; Zhao et al. 2023, PyTorch FSDP; Rajbhandari et al. 2020,
ZeRO). Each layer with parameters is a unit; parameters that several layers use, and all else of
those layers, are the root unit. A unit's parameters are gathered before its forward and its
backward pass, its gradients reduced to their mean and scattered after. `gradient_only` keeps
parameters gathered between the two passes (ZeRO-2). Parameters are cut along dimension 0 as
`torch.chunk` does, so the last shards may be shorter or empty: what the library sends is padded to
the first's. With several replicas this is hybrid sharding: the same shards agree over the topology.
Sends 3 (N-1)/N M bytes per rank and step, 4 (N-1)/N M on gloo, whose reduce-scatter costs an
all-reduce; gathered once instead of twice, (N-1)/N M less. And the loss, a number: 2 (N-1) messages
in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from benchsuite import parallel
from benchsuite.comm import Handle, Traffic
from benchsuite.errors import UsageError
from benchsuite.parallel.pieces import Piece, cut, num_owned, shapes_of
from benchsuite.parallel.replica import Replica, sum_traffic
from benchsuite.parallel.shards import Unit, padded_numel, shard, units_of
from benchsuite.topology import collective_traffic
from benchsuite.workload import (
    Batch,
    Ready,
    Shapes,
    Workload,
    seeded_layers,
    to_device,
    trained_parameters,
    views,
)


@dataclass
class Parallel(parallel.ModelParallel):
    """The `model_parallel` ranks of a replica share parameters, gradients and optimiser state."""

    reshard: Literal["but_root", "full", "gradient_only"] = "but_root"
    """When parameters are freed after the forward pass: all but the root unit's (torch's default),
    all, or none."""

    autocast = True
    divides = True
    colour = 1
    marks = ("^", "v")
    order = 3
    holds_slices = True
    divides_batch = True
    wall_only = "the library runs by the wall clock"

    acts_whole = True  # parameters are gathered once for a rollout

    def build(
        self,
        workload: Workload,
        replica: Replica | None,
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        autocast: bool = False,
    ) -> FSDPPart:
        """This rank's shards of the model, in the process group of its replica."""
        assert replica is not None
        return FSDPPart(
            workload, replica, self, seed=seed, dtype=dtype, device=device, autocast=autocast
        )

    def pieces(
        self, workload: Workload, layers: Sequence[nn.Module], size: int
    ) -> list[list[Piece]]:
        """Every part holds a shard of every parameter; none is a copy."""
        named = trained_parameters(nn.Sequential(*layers))
        return [
            [shard(name, p.shape, part, size) for name, p in named.items()] for part in range(size)
        ]

    def predicted_traffic(
        self,
        workload: Workload,
        layers: Sequence[nn.Module],
        batch: Batch,
        *,
        size: int,
        itemsize: int,
        clip: bool,
        backend: str = "gloo",
    ) -> Traffic:
        """Each unit is gathered for both passes, or once, and its gradients reduced once."""
        # The loss, and with clipping the square of the norm.
        traffic = sum_traffic(size).times(2 if clip else 1)

        for unit in units_of(layers):
            gather = collective_traffic("all_gather", unit.numel(size), itemsize, size)
            traffic += gather.times(1 if self.stays_gathered(unit) else 2)
            reduced = unit.numel(size, trained=True)
            traffic += collective_traffic(
                "reduce_scatter", reduced, itemsize, size, backend=backend
            )

        return traffic

    def predicted_inference(
        self,
        workload: Workload,
        layers: Sequence[nn.Module],
        x: Tensor,
        *,
        size: int,
        itemsize: int,
    ) -> Traffic:
        """Every unit is gathered once, whatever `x` is."""
        moved = [unit.numel(size) for unit in units_of(layers)]
        return Traffic.total(
            collective_traffic("all_gather", numel, itemsize, size) for numel in moved
        )

    def stays_gathered(self, unit: Unit) -> bool:
        """Whether a unit's parameters are kept between its forward and its backward pass."""
        return self.reshard == "gradient_only" or (unit.is_root and self.reshard == "but_root")


class FSDPPart(parallel.PartOfReplica):
    """One part of a replica, with a share of every parameter.

    Its flat vectors `params` and `grad` hold this part's shards, one after the other.
    """

    has_grad_buffer = True
    acts_whole = True

    def __init__(
        self,
        workload: Workload,
        replica: Replica,
        options: Parallel,
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        autocast: bool = False,
    ) -> None:
        layers = seeded_layers(workload, seed)
        module = nn.Sequential(*layers).to(dtype)
        named = trained_parameters(module)
        pieces = options.pieces(workload, layers, replica.size)[replica.part]

        # Not kept by this object: once they are sharded, the whole parameters shall be freed.
        units = units_of(layers)

        self._workload = workload
        self.replica = replica
        self._autocast = autocast
        self.num_gradients = 0

        # What lets go of parameters that stay gathered for a rollout, and whether they are.
        self._hold: ExitStack | None = None
        self._is_whole = False

        self._facts = _facts(
            options, units, {name: p.shape for name, p in named.items()}, pieces, replica
        )

        self.shapes: Shapes = shapes_of(pieces)
        self.num_owned = num_owned(pieces)
        self.params = cut(named, pieces).to(device)
        self.grad = torch.zeros_like(self.params)
        self._bind_grad()
        self.module: nn.Module = _sharded(module.to(device), units, options, replica)
        self._parameters = list(trained_parameters(self.module).values())

        # The library's copies of shards, and the views in the flat vector that they copy.
        self._copied = self._join_memory()

    def use_grad_buffer(self, buffer: Tensor) -> None:
        """Lets the gradient live in memory that a topology owns."""
        self.grad = buffer
        self._bind_grad()

    def _bind_grad(self) -> None:
        """Makes the views of the gradient, one per shard, in the order of the vector."""
        self._grads = list(views(self.grad, self.shapes).values())

    @torch.no_grad()
    def _join_memory(self) -> tuple[list[Tensor], list[Tensor]]:
        """Makes the library's shards views of the flat vector, and finds those that stay copies.

        The library keeps shards that it pads in memory of its own. Returned are these copies, and
        the views where their values stand. The library looks at its shards again when it first
        gathers, so that is done here, before anything is measured.
        """
        own = list(views(self.params, self.shapes).values())
        for parameter, view in zip(self._parameters, own, strict=True):
            _local(parameter).data = view

        for unit in _fsdp_modules(self.module):
            unit.unshard()
            unit.reshard()

        memory = self.params.untyped_storage().data_ptr()
        local = [_local(parameter) for parameter in self._parameters]
        copies = [
            at
            for at, mine in enumerate(local)
            if mine.numel() and mine.untyped_storage().data_ptr() != memory
        ]

        return [local[at] for at in copies], [own[at] for at in copies]

    def _refresh(self) -> None:
        """Gives the library's copies the values of the parameters, which a step has changed."""
        copies, values = self._copied
        if copies:
            with torch.no_grad():
                torch._foreach_copy_(copies, values)

    def _precision(self) -> AbstractContextManager[Any]:
        """The context of the forward pass and the loss: autocast, or none."""
        return (
            torch.autocast(self.params.device.type, torch.bfloat16)
            if self._autocast
            else nullcontext()
        )

    def gradient(
        self, batch: Batch, ready: Ready | None = None, until: Handle | None = None
    ) -> float | None:
        """Fills `grad` with this part's shards of the mean gradient, and returns the mean loss."""
        if ready is not None or until is not None:
            raise ValueError(
                "fsdp reduces inside its backward pass: no slices as they come, nothing to abandon"
            )

        self.num_gradients += 1
        batch = to_device(batch, self.replica.device)
        self._refresh()

        with self._precision():
            loss = self._workload.loss(self.module(batch.x), batch)

        loss.backward()
        self._take_gradients()

        return self.replica.sum(float(loss.detach())) / self.replica.size

    @torch.no_grad()
    def _take_gradients(self) -> None:
        """Moves the library's mean gradients into the flat vector.

        A parameter that the loss does not reach has gradient 0.
        """
        into = []
        found = []

        for parameter, view in zip(self._parameters, self._grads, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                into.append(view)
                found.append(parameter.grad.to_local())  # type: ignore[attr-defined]  # a DTensor
                parameter.grad = None

        torch._foreach_copy_(into, found)

    def gradient_norm(self) -> float:
        """Norm of the replica's whole gradient, of which no element stands on two parts."""
        return self.replica.norm(self.grad)

    def finite(self) -> bool:
        """Whether all parameters of the replica are finite."""
        return self.replica.all_finite(self.params)

    def infer(self, x: Tensor) -> Tensor:
        """Runs all of `x` forward on every part, with one unit gathered at a time.

        This goes past the library's own hooks: they count a forward pass as half of a step, and
        would gather once too often in the next one.
        """
        if not self._is_whole:
            self._refresh()
            self._gather_all()

        gathered = nullcontext if self._is_whole else _gathered
        training = self.module.training
        source = x.device
        x = x.to(self.replica.device)
        self.module.eval()

        try:
            with torch.no_grad(), self._precision(), gathered(self.module):
                for layer in self.module.children():
                    with gathered(layer):
                        x = layer.forward(x)

                return x.to(source, self.params.dtype if self._autocast else x.dtype)
        finally:
            self.module.train(training)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Promises that parameters do not change inside, so the first inference gathers for all.

        A rollout has hundreds of inferences; each would gather every unit once more.
        """
        with ExitStack() as self._hold:
            try:
                yield
            finally:
                self._hold = None
                self._is_whole = False

    def _gather_all(self) -> None:
        """Gathers every unit and keeps it so until `whole` ends.

        Outside of `whole` it does nothing: nobody has said that the parameters stay as they are.
        """
        if self._hold is not None:
            for unit in _fsdp_modules(self.module):
                self._hold.enter_context(_gathered(unit))

            self._is_whole = True

    def share(self, shard: int, num_shards: int) -> tuple[int, int]:
        """Every part reads a slice of its own: parts divide the replica's batch."""
        return shard * self.replica.size + self.replica.part, num_shards * self.replica.size

    def facts(self) -> Mapping[str, Any]:
        """Units and padding, for the run file."""
        return self._facts

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> None:
        """Is never called: the rules refuse a library's wrapper with `fsdp`."""
        raise AssertionError("a sharded module is not wrapped again")

    def backward(self, batch: Batch) -> float:
        """Is never called: the rules refuse a library's wrapper with `fsdp`."""
        raise AssertionError("a sharded module is not wrapped again")


@contextmanager
def _gathered(module: object) -> Iterator[None]:
    """Has a unit's parameters whole inside; a module that is no unit is left alone."""
    if not isinstance(module, FSDPModule):
        yield
        return

    module.unshard()

    try:
        yield
    finally:
        module.reshard()


def _sharded(
    module: nn.Sequential, units: Sequence[Unit], options: Parallel, replica: Replica
) -> nn.Module:
    """Calls `fully_shard` on every unit, then on the whole chain, which holds what is left."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0:
            raise UsageError(
                f"parameter {name} is a number, and fsdp cuts along dimension 0: give it the shape "
                "(1,), or set "
                "parallel = data"
            )

    mesh = DeviceMesh.from_group(replica.group, replica.device.type)
    layers = list(module)

    for unit in units:
        if not unit.is_root:
            fully_shard(
                layers[unit.layers[0]],
                mesh=mesh,
                reshard_after_forward=not options.stays_gathered(unit),
            )

    root = fully_shard(module, mesh=mesh, reshard_after_forward=options.reshard == "full")
    # A newer torch can send what has no gradient as zeros; an older one has no such setting.
    if hasattr(root, "set_reduce_scatter_unused_params"):
        root.set_reduce_scatter_unused_params(True)

    return module


def _fsdp_modules(module: nn.Module) -> Iterator[FSDPModule]:
    """The modules that the library has sharded: every unit, and the whole chain."""
    return (each for each in module.modules() if isinstance(each, FSDPModule))


def _local(parameter: Any) -> Tensor:
    """Returns the very tensor inside a DTensor; `to_local()` of a parameter makes a view of it."""
    names, _ = parameter.__tensor_flatten__()
    inner = (getattr(parameter, name) for name in names)

    return next(each for each in inner if isinstance(each, Tensor))


def _facts(
    options: Parallel,
    units: Sequence[Unit],
    named: Shapes,
    pieces: Sequence[Piece],
    replica: Replica,
) -> dict[str, Any]:
    """What the result file says of the units, and of the padding that the shards carry."""
    own = sum(piece.shape.numel() for piece in pieces)
    described = [
        {
            "layers": list(unit.layers),
            "root": unit.is_root,
            "numel": sum(p.numel() for p in unit.parameters),
            "moved_numel": unit.numel(replica.size),
            "stays_gathered": options.stays_gathered(unit),
        }
        for unit in units
    ]

    padded = sum(padded_numel(shape, replica.size) for shape in named.values()) // replica.size
    return {"units": described, "num_owned": own, "num_padded": padded - own}
