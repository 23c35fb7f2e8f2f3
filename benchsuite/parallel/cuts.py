"""Where a chain of layers is cut into stages, and what crosses the cuts.

Cut points are balanced by the layers' forward FLOPs, where the workload states them, else by their
parameters: an exact dynamic programme minimises the largest chunk (Narayanan et al. 2019,
PipeDream, section 3.1, without its links). A parameter that layers of several parts hold (tied
weights) belongs to the first of them; the others hold copies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from benchsuite.errors import UsageError
from benchsuite.parallel.pieces import Piece, ordered, whole
from benchsuite.workload import Workload, trained_parameters


@dataclass(frozen=True)
class Cuts:
    """Where the chain is cut into chunks: chunk k stands on part k % size.

    So the chain goes through chunk 0 of every part, then through chunk 1 of every part, and so on.
    """

    chunks: Sequence[range]  # layers of each chunk, in the order of the chain
    loads: Sequence[float]  # of each layer
    by: str  # what the loads are: "flops" or "parameters"
    size: int  # parts

    def of_part(self, part: int) -> list[int]:
        """Numbers of the chunks that a part holds."""
        return list(range(part, len(self.chunks), self.size))

    def part_of(self, chunk: int) -> int:
        """Returns the part on which a chunk stands."""
        return chunk % self.size

    def layers_of(self, part: int) -> list[int]:
        """Numbers of the layers that a part holds, in the order of the chain."""
        return [layer for chunk in self.of_part(part) for layer in self.chunks[chunk]]

    def load_of(self, part: int) -> float:
        """Returns the load of a part, the sum over its layers."""
        return sum(self.loads[layer] for layer in self.layers_of(part))

    @property
    def balance(self) -> float:
        """The total load over parts times the largest one: no schedule keeps parts busier."""
        largest = max(self.load_of(part) for part in range(self.size))
        return sum(self.loads) / (self.size * largest) if largest else 1.0


def cuts(workload: Workload, layers: Sequence[nn.Module], *, size: int, num_chunks: int) -> Cuts:
    """Cuts a chain over `size` parts with `num_chunks` chunks each.

    The layers may be on the meta device. UsageError where there are too few of them.
    """
    counted = workload.layer_flops()

    if counted is None:
        loads = [_parameters(layer) for layer in layers]
    else:
        loads = [float(flops) for flops in counted]

    assert len(loads) == len(layers), (
        f"layer_flops() has {len(loads)} entries, layers() {len(layers)}"
    )

    chunks = balanced(
        loads, size * num_chunks, [bool(trained_parameters(layer)) for layer in layers], size
    )

    if chunks is None:
        trained = sum(bool(trained_parameters(layer)) for layer in layers)
        raise UsageError(
            f"{len(layers)} layers, {trained} of them with parameters, on stages({size}) x "
            f"num_chunks({num_chunks}): "
            "each chunk needs a layer, the first one of each stage parameters: set a smaller "
            "model_parallel"
        )

    return Cuts(chunks, loads, "parameters" if counted is None else "flops", size)


def _parameters(layer: nn.Module) -> float:
    """Number of trained parameters of a layer, its load where nobody worked out the FLOPs."""
    return float(sum(p.numel() for p in trained_parameters(layer).values()))


def balanced(
    loads: Sequence[float], count: int, trained: Sequence[bool], size: int
) -> list[range] | None:
    """Cuts the chain into `count` runs of layers whose largest load is as small as can be.

    Each of the first `size` runs has a trained layer. Of several ways with the same largest load it
    is the most equal one that a dynamic programme over prefixes finds; None where there is no way.
    """
    at = [0.0, *accumulate(loads)]
    before = [0, *accumulate(map(int, trained))]
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {
        0: (0.0, 0.0, ())
    }  # end -> largest, squares, ends

    for chunk in range(count):
        reached: dict[int, tuple[float, float, tuple[int, ...]]] = {}

        for end in range(1, len(loads) + 1):
            ways = [
                (
                    max(largest, at[end] - at[start]),
                    squares + (at[end] - at[start]) ** 2,
                    (*ends, end),
                )
                for start, (largest, squares, ends) in best.items()
                if start < end and (chunk >= size or before[start] < before[end])
            ]

            if ways:
                reached[end] = min(ways)

        best = reached

    if len(loads) not in best:
        return None

    ends = best[len(loads)][2]
    return [range(start, end) for start, end in zip((0, *ends[:-1]), ends, strict=True)]


def holders(found: Cuts, layers: Sequence[nn.Module]) -> dict[str, list[int]]:
    """Parameter of the whole model -> the parts that hold it, the first layer's first."""
    held: dict[str, list[int]] = {}

    for name, parameter in trained_parameters(nn.Sequential(*layers)).items():
        chunks = [
            number
            for number, chunk in enumerate(found.chunks)
            if any(parameter is p for layer in chunk for p in layers[layer].parameters())
        ]

        held[name] = list(dict.fromkeys(found.part_of(chunk) for chunk in chunks))

    return held


def pieces_of(found: Cuts, layers: Sequence[nn.Module]) -> list[list[Piece]]:
    """What each part holds: whole parameters, in the order of the chain, copies last."""
    shapes = {name: p.shape for name, p in trained_parameters(nn.Sequential(*layers)).items()}
    held = holders(found, layers)

    return [
        ordered(
            whole(name, shapes[name], owned=parts[0] == part)
            for name, parts in held.items()
            if part in parts
        )
        for part in range(found.size)
    ]


def on_meta(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The same layers without their numbers; shared parameters stay shared, nothing is copied."""
    known: dict[int, Any] = {}

    for layer in layers:
        for tensor in (*layer.parameters(), *layer.buffers()):
            bare = tensor.detach().to("meta")
            known[id(tensor)] = (
                nn.Parameter(bare, tensor.requires_grad)
                if isinstance(tensor, nn.Parameter)
                else bare
            )

    return [copy.deepcopy(layer, known) for layer in layers]


def outputs(found: Cuts, layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """What leaves each chunk, of layers on the meta device; the last one is the chain's output."""
    x = x.to("meta")
    left = []

    with torch.no_grad():
        for chunk in found.chunks:
            for layer in chunk:
                x = layers[layer](x)

            x = torch.empty(x.shape, dtype=x.dtype, device="meta")  # contiguous
            left.append(x)

    return left


def crossings(
    found: Cuts, leaves: Sequence[Tensor], itemsize: int
) -> Iterator[tuple[int, int, int]]:
    """Lists (from part, to part, bytes) of what leaves each chunk for one on another part.

    itemsize: bytes of an element of a parameter, and so of an activation.
    """
    for chunk, left in enumerate(leaves[:-1]):
        here = found.part_of(chunk)
        there = found.part_of(chunk + 1)

        if here != there:
            yield (
                here,
                there,
                left.numel() * (itemsize if left.is_floating_point() else left.itemsize),
            )
