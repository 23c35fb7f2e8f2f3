"""Which part of a replica holds which pieces of the whole model's parameters.

Every part's flat vector is made of such pieces, one after the other. There is one
description for building, for servers (which own slices of parts that they do not compute), for
predictions and for the laws, which put the pieces together again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite.workload import Shapes


@dataclass(frozen=True)
class Piece:
    """Rows [start, start + shape[dim]) of one parameter along `dim`."""

    name: str  # of the parameter in the whole model
    shape: torch.Size  # of the piece
    dim: int = 0
    start: int = 0

    # False of a copy of what another part owns (tied or replicated): it counts there.
    owned: bool = True

    def of(self, whole: Tensor) -> Tensor:
        """The piece as a view of the whole parameter; a single number cannot be divided."""
        if whole.dim() == 0:
            return whole

        length = self.shape[self.dim]
        return whole.narrow(self.dim, self.start, length)


def whole(name: str, shape: torch.Size, *, owned: bool = True) -> Piece:
    """A piece that is all of a parameter."""
    return Piece(name, shape, owned=owned)


def ordered(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces with those first that the part owns, the order kept otherwise.

    So what a part owns is one run at the beginning of its flat vector.
    """
    return sorted(pieces, key=lambda piece: not piece.owned)


def shapes_of(pieces: Sequence[Piece]) -> Shapes:
    """Names and shapes of the views into a part's flat vector."""
    return {piece.name: piece.shape for piece in pieces}


def num_owned(pieces: Sequence[Piece]) -> int:
    """Elements at the beginning of the flat vector that this part owns."""
    return sum(piece.shape.numel() for piece in pieces if piece.owned)


def cut(parameters: Mapping[str, Tensor], pieces: Sequence[Piece]) -> Tensor:
    """A part's flat vector, from the whole model's parameters."""
    return torch.cat([piece.of(parameters[piece.name].detach()).reshape(-1) for piece in pieces])


def join(vectors: Sequence[Tensor], pieces: Sequence[Sequence[Piece]], shapes: Shapes) -> Tensor:
    """The whole model's flat vector from those of all parts; an element that nobody owns is NaN."""
    like = vectors[0]

    # NaN shows an element that was forgotten; a zero could pass for a value.
    parameters = {
        name: torch.full(shape, torch.nan, dtype=like.dtype) for name, shape in shapes.items()
    }

    for vector, held in zip(vectors, pieces, strict=True):
        for view, piece in zip(
            vector.split([piece.shape.numel() for piece in held]), held, strict=True
        ):
            if piece.owned:
                piece.of(parameters[piece.name]).copy_(view.view(piece.shape))

    return torch.cat([parameter.reshape(-1) for parameter in parameters.values()])
