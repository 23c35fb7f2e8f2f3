"""What a workload's `tensor_plan` makes of its chain of layers, for tensor parallelism.

It says which part holds which slice, what torch's library is told, and which collectives that
costs. No process group is needed, because servers and predictions ask too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
)

from benchsuite.parallel.channels import GroupedChannels, InputChannels, OutputChannels
from benchsuite.parallel.pieces import Piece, whole
from benchsuite.workload import trained_parameters

# A kind of collective, and the elements of the whole vector that it is about.
Collective = tuple[Literal["all_reduce", "all_gather", "reduce_scatter"], int]

TOKENS = 1  # the dimension of (B, T, d) that is cut

# How a module is split -> the modules that can be.
SPLIT: Mapping[str, tuple[type[nn.Module], ...]] = {
    "columns": (nn.Linear, nn.Conv2d),
    "rows": (nn.Linear, nn.Conv2d),
    "gathered": (nn.Linear,),
    "channels": (nn.GroupNorm,),
    "tokens": (nn.Module,),
}


class Split:
    """A chain of layers, split over `size` parts.

    ValueError for a plan that cannot be carried out.
    """

    def __init__(
        self, chain: nn.Sequential, plan: Mapping[str, str], *, size: int, tokens: bool
    ) -> None:
        self.size = size
        self._chain = chain
        self._plan = dict(plan) if size > 1 else {}

        # Layers in which a part sees a slice of the tokens, each once, in the order of the plan.
        layers: list[str] = []
        if tokens:
            layers = [_layer(name) for name, how in self._plan.items() if how == "tokens"]

        self._token_layers = list(dict.fromkeys(layers))

        # Parameters in the order of a part's vector.
        found = {name: parameter.shape for name, parameter in trained_parameters(chain).items()}
        self._shapes = {name: found[name] for name in sorted(found, key=self._place)}
        self._check()

    def _place(self, name: str) -> int:
        """Slices come first in a part's vector, parameters with partial gradients last."""
        if self._dim(name) is not None:
            return 0

        return 2 if self._is_partial(name) else 1

    def _dim(self, name: str) -> int | None:
        """The dimension along which a parameter is split; None = it stands on every part."""
        module, _, leaf = name.rpartition(".")
        how = self._plan.get(module, "")
        if how in ("columns", "gathered", "channels"):
            return 0

        return 1 if how == "rows" and leaf == "weight" else None

    def _is_partial(self, name: str) -> bool:
        """Whether a parameter's gradient is a sum over parts that see different tokens.

        A bias behind rows is the library's: it gathers the gradient of the output.
        """
        return (
            _layer(name) in self._token_layers
            and self._plan.get(name.rpartition(".")[0], "tokens") == "tokens"
        )

    def _check(self) -> None:
        """Raises ValueError where the plan names what cannot be split, or does not divide."""
        holders: dict[int, str] = {}

        for name, parameter in self._chain.named_parameters(remove_duplicate=False):
            first = holders.setdefault(id(parameter), name)
            if first != name and not self._dim(name) is self._dim(first) is None:
                raise ValueError(
                    f"tensor_plan splits {name}, which is {first} too: a tied parameter stays whole"
                )

        for name, how in self._plan.items():
            module = self._chain.get_submodule(name)

            if not isinstance(module, SPLIT.get(how, ())):
                known = {
                    each: " or ".join(kind.__name__ for kind in kinds)
                    for each, kinds in SPLIT.items()
                }

                raise ValueError(
                    f"tensor_plan[{name!r}] = {how!r} of a {type(module).__name__}; known: {known}"
                )

            if getattr(module, "groups", 1) != 1:
                raise ValueError(
                    f"tensor_plan[{name!r}] = {how!r}: a convolution in groups is not split"
                )

            if _layer(name) in self._token_layers and how not in ("tokens", "columns", "rows"):
                raise ValueError(
                    f"tensor_plan[{name!r}] = {how!r} in a layer of tokens: columns and rows only"
                )

            lengths = [
                (leaf, parameter.shape[dim])
                for leaf, parameter in module.named_parameters(recurse=False)
                if (dim := self._dim(f"{name}.{leaf}")) is not None
            ]

            groups = [("num_groups", module.num_groups)] if isinstance(module, nn.GroupNorm) else []

            for what, length in [*lengths, *groups]:
                if length % self.size:
                    raise ValueError(
                        f"{name}.{what}: {length} is not divisible by model_parallel({self.size}): "
                        "set it to a divisor"
                    )

    # -- parameters --------------------------------------------------------------------------------

    def pieces(self, part: int) -> list[Piece]:
        """Lists what a part holds, in the order of its vector: what it owns first.

        What is not split stands on every part, and part 0 owns it.
        """
        found = []

        for name, shape in self._shapes.items():
            dim = self._dim(name)
            if dim is None:
                found.append(whole(name, shape, owned=part == 0))
            else:
                length = shape[dim] // self.size
                slice_shape = torch.Size([*shape[:dim], length, *shape[dim + 1 :]])
                found.append(Piece(name, slice_shape, dim, part * length))

        return found

    @property
    def num_partial(self) -> int:
        """Elements at the end of every part's vector whose gradients a sum over parts completes."""
        return sum(shape.numel() for name, shape in self._shapes.items() if self._is_partial(name))

    @property
    def num_replicated(self) -> int:
        """Elements that stand on every part."""
        return sum(shape.numel() for name, shape in self._shapes.items() if self._dim(name) is None)

    # -- computing ---------------------------------------------------------------------------------

    def styles(self) -> list[tuple[str, ParallelStyle]]:
        """Lists what `parallelize_module` is told, module by module."""
        styles: list[tuple[str, ParallelStyle]] = []

        for name, how in self._plan.items():
            is_conv = isinstance(self._chain.get_submodule(name), nn.Conv2d)
            layout = Shard(TOKENS) if _layer(name) in self._token_layers else Replicate()

            if how == "columns":
                styles.append(
                    (name, OutputChannels() if is_conv else ColwiseParallel(input_layouts=layout))
                )
            elif how == "rows":
                styles.append(
                    (name, InputChannels() if is_conv else RowwiseParallel(output_layouts=layout))
                )
            elif how == "gathered":
                styles.append((name, ColwiseParallel(output_layouts=Replicate())))
            elif how == "channels":
                styles.append((name, GroupedChannels()))

        # Where tokens begin to be cut, and where they are whole again.
        for first, last in self._runs():
            styles.append(
                (
                    first,
                    PrepareModuleInput(
                        input_layouts=Replicate(),
                        desired_input_layouts=Shard(TOKENS),
                        use_local_output=True,
                    ),
                )
            )

            styles.append(
                (
                    last,
                    PrepareModuleOutput(
                        output_layouts=Shard(TOKENS),
                        desired_output_layouts=Replicate(),
                        use_local_output=True,
                    ),
                )
            )

        return styles

    def _runs(self) -> list[tuple[str, str]]:
        """Lists the first and last of neighbouring layers between which tokens stay cut."""
        found: list[tuple[str, str]] = []

        for layer in sorted(self._token_layers, key=int):
            if found and int(layer) == int(found[-1][1]) + 1:
                found[-1] = (found[-1][0], layer)
            else:
                found.append((layer, layer))

        return found

    def collectives(self, x: Tensor) -> list[Collective]:
        """Lists the collectives of one gradient, or under `torch.no_grad` those of one inference.

        Their sizes are what a forward pass of the whole chain shows, on any device, meta included.
        """
        found: list[Collective] = []
        seen: list[tuple[str, Callable[..., None]]] = [
            (name, partial(_of_module, found, how, _layer(name) in self._token_layers))
            for name, how in self._plan.items()
        ]

        for first, last in self._runs():
            ends = {"first": first, "last": last}
            seen += [(name, partial(_of_module, found, end, True)) for end, name in ends.items()]

        hooks = [self._chain.get_submodule(name).register_forward_hook(hook) for name, hook in seen]
        self._chain(x)

        for hook in hooks:
            hook.remove()

        partial_sums = self.num_partial if torch.is_grad_enabled() else 0
        return [*found, ("all_reduce", partial_sums)] if partial_sums else found


def _of_module(
    found: list[Collective],
    how: str,
    tokens: bool,
    module: nn.Module,
    inputs: tuple[Any, ...],
    output: Tensor,
) -> None:
    """Adds the collectives of one module, forward and backward, to those found.

    A gradient is sent only where one is asked for: that of an image, say, is not.
    """
    taken = inputs[0].numel()
    made = output.numel()
    wanted = inputs[0].requires_grad

    if how in ("columns", "gathered"):
        found.extend([("all_gather", taken)] if tokens else [])
        found.extend([("reduce_scatter" if tokens else "all_reduce", taken)] if wanted else [])

    if how == "rows":
        found.append(("reduce_scatter" if tokens else "all_reduce", made))
        found.extend([("all_gather", made)] if tokens and output.requires_grad else [])

    if how in ("gathered", "last"):
        found.append(("all_gather", made))

    if how == "first" and wanted:
        found.append(("all_gather", taken))


def _layer(name: str) -> str:
    """Returns the number of the layer that a module or parameter belongs to."""
    return name.split(".")[0]
