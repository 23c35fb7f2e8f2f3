"""Laws of one update: clipping is torch's, over a whole vector and over slices of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases
from benchsuite.laws.harness.runs import relative, worst
from benchsuite.plan.cell import Cell
from benchsuite.update import clip, clip_factor

BOUND = 1e-14
Clip = Callable[[Tensor, float | None], None]


def clip_is_torchs(make_ranks: MakeRanks, cell: Cell, *, how: Clip = clip) -> Figure:
    """Clipping equals torch's for norms above, at and below the limit.

    Vectors are clipped as one and, by the factor, in three slices. Bound: a relative error of
    1e-14. The twins lengthen short gradients, or have no epsilon.
    """
    figures = []
    for scale, limit in ((100.0, 0.5), (1e-3, 0.5), (1.0, None), (1e-9, 1e-8)):
        generator = torch.Generator().manual_seed(1)
        gradient = torch.randn(1001, generator=generator, dtype=torch.float64) * scale
        holders = [nn.Parameter(torch.zeros_like(piece)) for piece in gradient.split(77)]
        for holder, piece in zip(holders, gradient.split(77), strict=True):
            holder.grad = piece.clone()
        if limit is not None:
            nn.utils.clip_grad_norm_(holders, limit)
        theirs = torch.cat([holder.grad for holder in holders if holder.grad is not None])
        mine = gradient.clone()
        how(mine, limit)
        figures.append(
            (relative(mine - theirs, theirs), f"norm {float(gradient.norm()):.3g}, limit {limit}")
        )
    value, where = worst(figures)
    return Figure(value, BOUND, f"relative difference, worst at {where}")


def _by_slices(grad: Tensor, limit: float | None) -> None:
    """Clips every slice by its own norm, as servers would that do not ask each other."""
    for piece in grad.split(334):
        clip(piece, limit)


def _always(grad: Tensor, limit: float | None) -> None:
    """Scales to the limit, also from below."""
    if limit is not None:
        grad.mul_(limit / float(grad.norm()))


def _without_epsilon(grad: Tensor, limit: float | None) -> None:
    """Clips without the epsilon that torch adds to the norm."""
    if limit is not None:
        grad.mul_(min(1.0, limit / float(grad.norm())))


def _by_factor(grad: Tensor, limit: float | None) -> None:
    """Clips as servers do: squares of slices are added, and one factor scales all."""
    if limit is not None:
        norm = sum(float(torch.dot(piece, piece)) for piece in grad.split(334)) ** 0.5
        grad.mul_(clip_factor(norm, limit))


def slices_clip_as_one(make_ranks: MakeRanks, cell: Cell, *, how: Clip = _by_factor) -> Figure:
    """Slices scaled by the factor of their common norm are torch's clipped vector.

    Bound: a relative error of 1e-14. In the twin each slice is clipped by its own norm.
    """
    return clip_is_torchs(make_ranks, cell, how=how)


def _any(cell: Cell) -> bool:
    """Every cell will do, because the laws need none."""
    return True


CELLS = cases.ONE_REPLICA
LAWS = (
    Law(
        "clipping is torch's clip_grad_norm_",
        clip_is_torchs,
        _any,
        (
            Control("short gradients are lengthened", partial(clip_is_torchs, how=_always)),
            Control("torch's epsilon is missing", partial(clip_is_torchs, how=_without_epsilon)),
        ),
    ),
    Law(
        "slices clip as one vector",
        slices_clip_as_one,
        _any,
        (
            Control(
                "each slice is clipped by its own norm", partial(slices_clip_as_one, how=_by_slices)
            ),
        ),
    ),
)
