"""How `fsdp` divides a model: by units, which are gathered together, and units by shards.

A unit is a layer, or several that share parameters; a shard is the rows of a parameter that one
part holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchsuite.parallel.pieces import Piece


@dataclass(frozen=True)
class Unit:
    """What is gathered and reduced together: one layer, or the layers that share parameters."""

    layers: tuple[int, ...]  # numbers in the chain
    parameters: tuple[nn.Parameter, ...]
    is_root: bool

    def numel(self, size: int, *, trained: bool = False) -> int:
        """Elements of the whole vector that the library moves, padding included.

        Parameters are gathered whether they are trained or not; gradients exist only of those that
        are (`trained`).
        """
        moved = [p for p in self.parameters if p.requires_grad or not trained]
        return sum(padded_numel(p.shape, size) for p in moved)


def units_of(layers: Sequence[nn.Module]) -> list[Unit]:
    """The units that have parameters, in the order of the chain, the root last.

    A layer that shares a parameter with another cannot be a unit of its own: the library would
    free the parameter after one of them while the other still needs it.
    """
    # The parameters of each layer, and how many layers hold each parameter.
    held = [list(dict.fromkeys(layer.parameters())) for layer in layers]
    users = Counter(p for parameters in held for p in parameters)
    root = tuple(number for number, own in enumerate(held) if any(users[p] > 1 for p in own))

    shared = tuple(dict.fromkeys(p for number in root for p in held[number]))
    alone = [
        Unit((number,), tuple(own), False)
        for number, own in enumerate(held)
        if own and number not in root
    ]

    return alone + ([Unit(root, shared, True)] if shared else [])


def padded_numel(shape: torch.Size, size: int) -> int:
    """Elements of a parameter whose rows are filled up to a multiple of `size`."""
    return longest_shard(shape, size) * size * shape[1:].numel()


def shard(name: str, shape: torch.Size, part: int, size: int) -> Piece:
    """The rows of a parameter that one part holds, as `torch.chunk` cuts them.

    The last shards may be shorter than the others, or empty.
    """
    rows = longest_shard(shape, size)
    start = min(part * rows, shape[0])
    stop = min(start + rows, shape[0])

    return Piece(name, torch.Size((stop - start, *shape[1:])), start=start)


def longest_shard(shape: torch.Size, size: int) -> int:
    """Rows of the first shard, which no other one exceeds."""
    return -(-shape[0] // size)
