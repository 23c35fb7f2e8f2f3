"""Tensor parallelism: every part holds a slice of the layers' weights (Shoeybi et al. 2019,
Megatron-LM).

torch's `parallelize_module` with the workload's `tensor_plan`: a layer split by its outputs
("columns") is followed by one split by its inputs ("rows"), so that what is between them is never
sent. Convolutions and their GroupNorm, for which the library has no style, are split in the same
way along their channels. What the plan does not name stands on every part: it is computed
everywhere alike and its gradient is equal everywhere, so that it counts on part 0 alone. Sends,
with A the bytes of a pair's input and output, one all-reduce forward and one backward per pair: 4
(t-1)/t A per rank, so 8 (t-1)/t A per transformer block, whatever P is. A "gathered" layer is split
alone: it gathers its outputs. `sequence_parallel` (Korthikanti et al. 2022): between two pairs
every part holds a slice of the tokens; all-reduces become reduce-scatters and all-gathers, on NCCL
of equal bytes (here gathers come back in the backward pass, and gloo's reduce-scatter costs an
all-reduce). Gradients of what stands there on every part are added up by one all-reduce.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from benchsuite import parallel
from benchsuite.comm import Handle, Traffic
from benchsuite.parallel.pieces import Piece, cut, num_owned, shapes_of
from benchsuite.parallel.replica import Replica, sum_traffic
from benchsuite.parallel.split import Collective, Split
from benchsuite.topology import collective_traffic
from benchsuite.workload import (
    Batch,
    DeviceLoss,
    Ready,
    Workload,
    seeded_layers,
    to_device,
    trained_parameters,
    views,
)


@dataclass
class Parallel(parallel.ModelParallel):
    """The weights of each layer are split over the parts of a replica."""

    sequence_parallel: bool = False
    """Between two pairs of split layers a part holds a slice of the tokens."""

    divides = True
    colour = 3
    marks = ("D", "X")
    order = 2
    holds_slices = True
    splits_weights = True
    wall_only = "the library runs by the wall clock"

    def build(
        self,
        workload: Workload,
        replica: Replica | None,
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> TensorPart:
        """This rank's slices of the model, in the process group of its replica."""
        assert replica is not None
        layers = [layer.to(dtype) for layer in seeded_layers(workload, seed)]

        return TensorPart(
            workload, layers, self._split(workload, layers, replica.size), replica, device=device
        )

    def _split(self, workload: Workload, layers: Sequence[nn.Module], size: int) -> Split:
        """Says how the workload's plan divides its chain over `size` parts."""
        return Split(
            nn.Sequential(*layers), workload.tensor_plan(), size=size, tokens=self.sequence_parallel
        )

    def pieces(
        self, workload: Workload, layers: Sequence[nn.Module], size: int
    ) -> list[list[Piece]]:
        """Every part holds its slices first, then what stands on every part."""
        split = self._split(workload, layers, size)
        return [split.pieces(part) for part in range(size)]

    def collectives(
        self, workload: Workload, layers: Sequence[nn.Module], batch: Batch, size: int
    ) -> list[Collective]:
        """Lists the library's collectives in one gradient of one replica."""
        return self._split(workload, layers, size).collectives(batch.x)

    def predicted_inference(
        self,
        workload: Workload,
        layers: Sequence[nn.Module],
        x: Tensor,
        *,
        size: int,
        itemsize: int,
    ) -> Traffic:
        """The collectives of a forward pass alone."""
        with torch.no_grad():
            found = self._split(workload, layers, size).collectives(x)

        return Traffic.total(
            collective_traffic(kind, numel, itemsize, size) for kind, numel in found
        )

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
        """The collectives of one gradient, and with clipping the sum of the norm's square."""
        traffic = sum_traffic(size) if clip else Traffic()
        for kind, numel in self.collectives(workload, layers, batch, size):
            traffic += collective_traffic(kind, numel, itemsize, size, backend=backend)

        return traffic


class TensorPart(parallel.PartOfReplica):
    """One part of a replica; its flat vectors hold its slices, then what stands on every part."""

    def __init__(
        self,
        workload: Workload,
        layers: Sequence[nn.Module],
        split: Split,
        replica: Replica,
        *,
        device: torch.device,
    ) -> None:
        self.replica = replica
        self.num_gradients = 0
        self._workload = workload
        self._split = split

        chain = nn.Sequential(*layers)
        pieces = split.pieces(replica.part)
        self.shapes = shapes_of(pieces)
        self.num_owned = num_owned(pieces)
        self.params = cut(trained_parameters(chain), pieces).to(device)
        self.grad = torch.zeros_like(self.params)
        self._grads = list(views(self.grad, self.shapes).values())

        # Gradients of parameters in layers of tokens: each part has those of its own tokens.
        self._partial = self.grad[self.grad.numel() - split.num_partial :]
        self.module: nn.Module = chain.to(device)

        if split.size > 1:
            mesh = DeviceMesh.from_group(replica.group, device.type)

            # `src_data_rank=None`: nothing is sent, because every part has made the same whole.
            for name, style in split.styles():
                parallelize_module(chain, mesh, {name: style}, src_data_rank=None)

        self._parameters = [
            self._bind(name, view) for name, view in views(self.params, self.shapes).items()
        ]

    def _bind(self, name: str, view: Tensor) -> nn.Parameter:
        """Lets the module compute with the flat vector's own elements, by a view of them."""
        owner, _, leaf = name.rpartition(".")
        module = self.module.get_submodule(owner)
        parameter: nn.Parameter = getattr(module, leaf)

        whole = parameter.data

        if not isinstance(whole, DTensor):
            parameter.data = view
            return parameter

        bound = nn.Parameter(
            DTensor.from_local(view, whole.device_mesh, whole.placements, run_check=False)
        )

        module.register_parameter(leaf, bound)
        return bound

    def gradient(
        self, batch: Batch, ready: Ready | None = None, until: Handle | None = None
    ) -> float:
        """Fills `grad` with this part's slices of the gradient, and returns the loss."""
        if ready is not None or until is not None:
            raise ValueError(
                "a part's gradient is whole when it is returned and never abandoned: no `ready`, "
                "no `until`"
            )

        self.num_gradients += 1
        batch = to_device(batch, self.replica.device)
        loss = self._workload.loss(self.module(batch.x), batch)
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        torch._foreach_copy_(self._grads, list(map(_local, gradients, self._parameters)))

        # The library does not know that these are parts of a sum.
        if self._partial.numel():
            dist.all_reduce(self._partial, group=self.replica.group)

        loss = loss.detach()
        return float(loss) if self.replica.device.type == "cpu" else DeviceLoss(loss)

    def gradient_norm(self) -> float:
        """Norm of the replica's whole gradient; what stands on every part counts once."""
        return self.replica.norm(self.grad[: self.num_owned])

    def finite(self) -> bool:
        """Whether the parameters of all parts are finite."""
        return self.replica.all_finite(self.params)

    def infer(self, x: Tensor) -> Tensor:
        """Forward without gradient, by all parts together; the result stands where `x` does."""
        training = self.module.training
        self.module.eval()

        try:
            with torch.no_grad():
                output: Tensor = self.module(x.to(self.replica.device))
                return output.to(x.device)
        finally:
            self.module.train(training)

    def share(self, shard: int, num_shards: int) -> tuple[int, int]:
        """Every part reads the replica's whole share."""
        return shard, num_shards

    def facts(self) -> Mapping[str, Any]:
        """How many elements are split, stand on every part, or have gradients summed apart."""
        replicated = self._split.num_replicated
        return {
            "split_elements": self.params.numel() - replicated,
            "replicated_elements": replicated,
            "partial_elements": self._split.num_partial,
        }

    def wrap(self, wrapper: Any) -> None:
        """Is never called: the rules refuse a library's wrapper with `tensor`."""
        raise AssertionError("a library's wrapper goes around a replica on one rank")

    def backward(self, batch: Batch) -> float:
        """Is never called: the rules refuse a library's wrapper with `tensor`."""
        raise AssertionError("a library's wrapper goes around a replica on one rank")


def _local(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """Returns this part's slice of a gradient, 0 for a parameter that the loss does not reach."""
    if gradient is None:
        gradient = torch.zeros_like(parameter)

    if not isinstance(gradient, DTensor):
        return gradient

    assert isinstance(parameter, DTensor)
    if gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)

    return gradient.to_local()
