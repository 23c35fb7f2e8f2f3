"""Laws of `Part.gradient`: what is announced, what is unused, and what bf16 rounds.

Announced slices are the gradient, in the order of the backward pass; a parameter that the loss
misses has gradient 0; under bf16 the gradient is the float32 one, rounded.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases
from benchsuite.laws.harness.runs import count_different, relative
from benchsuite.plan.cell import Cell, resolve
from benchsuite.worker import devices, setup
from benchsuite.workload import Batch, Part, Workload, read_loss

Wrap = Callable[[Part], Any]


def whole(part: Part) -> Any:
    """The part as it is."""
    return part


class _Idle(nn.Module):
    """A layer that hands its input on and has a parameter which is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x


class _WithIdle:
    """A workload with an idle layer in front of its chain."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workload, name)

    def layers(self) -> list[nn.Module]:
        return [_Idle(), *self._workload.layers()]


def _part(cell: Cell) -> tuple[Part, Batch]:
    """One rank's part with an idle layer, and a batch."""
    workload: Any = _WithIdle(setup.start_workload(cell))
    dtype = setup.DTYPES[cell.precision]
    parallel = setup.make_parallel(cell)
    part: Part = parallel.build(
        workload, None, seed=cell.seed, dtype=dtype, device=torch.device("cpu")
    )
    return part, workload.batch(1, shard=0, num_shards=1)


def announced_is_the_gradient(make_ranks: MakeRanks, cell: Cell, *, wrap: Wrap = whole) -> Figure:
    """With `ready` the vector, the loss and every announced slice have the plain gradient's bits.

    Bound: exact. The twins announce slices too early, or leave one out.
    """
    cell = resolve(cell)
    plain_part, batch = _part(cell)
    plain_loss = plain_part.gradient(batch)
    part, batch = _part(cell)
    early: Tensor = torch.full_like(part.grad, float("nan"))

    def ready(start: int, stop: int) -> None:
        early[start:stop] = part.grad[start:stop]

    loss = wrap(part).gradient(batch, ready)
    different = count_different(part.grad, plain_part.grad) + count_different(
        early, plain_part.grad
    )
    different += int(loss != plain_loss)
    return Figure(
        different,
        0,
        f"{different} of {2 * early.numel()} elements differ, loss {loss} and {plain_loss}",
    )


def slices_cover_backwards(make_ranks: MakeRanks, cell: Cell, *, wrap: Wrap = whole) -> Figure:
    """The announced slices cover the vector once, from its end to its start.

    A used parameter comes before all that stand before it in the vector. Bound: exact. The twins
    announce forwards, or leave a slice out.
    """
    cell = resolve(cell)
    part, batch = _part(cell)
    slices: list[tuple[int, int]] = []
    wrap(part).gradient(batch, lambda start, stop: slices.append((start, stop)))
    times = torch.zeros(part.grad.numel())
    for start, stop in slices:
        times[start:stop] += 1
    not_once = int((times != 1).sum())
    first_of_layer = _layer_starts(part)
    layers = [
        max(index for index, start in enumerate(first_of_layer) if start <= begin)
        for begin, _ in slices
    ]
    forwards = sum(later > earlier for earlier, later in itertools.pairwise(layers))
    return Figure(
        not_once + forwards,
        0,
        f"{not_once} elements not announced once, {forwards} of {len(slices)} slices out of order",
    )


def _layer_starts(part: Part) -> list[int]:
    """Where each layer of the chain begins in the flat vector."""
    starts = []
    at = 0
    seen = ""
    for name, shape in part.shapes.items():
        layer = name.split(".")[0]
        if layer != seen:
            starts.append(at)
            seen = layer
        at += shape.numel()
    return starts


def unused_is_zero(make_ranks: MakeRanks, cell: Cell, *, wrap: Wrap = whole) -> Figure:
    """A parameter that the loss does not reach has gradient 0, whatever stood there before.

    It is so with `ready` and without. Bound: exact. The twin keeps old values.
    """
    cell = resolve(cell)
    wrong = 0
    for ready in (None, lambda start, stop: None):
        part, batch = _part(cell)
        part.grad.fill_(7.0)
        wrap(part).gradient(batch, ready)
        wrong += int((part.grad[:3] != 0).sum())
    return Figure(wrong, 0, f"{wrong} of 6 elements of an unused parameter are not 0")


BF16_ROUNDING = 2.0**-8  # the relative step of a number with 8 bits


def bf16_is_close(
    make_ranks: MakeRanks,
    cell: Cell,
    *,
    autocast: bool = True,
    scale: float = 1.0,
    loss_scale: float = 1.0,
) -> Figure:
    """Under autocast, loss and gradient are float32's up to bfloat16's roundings, not its bits.

    There are a few roundings per layer. Parameters and gradient stay in float32. Where nothing
    differs nothing was cast, and that counts as the worst figure. In the twins autocast is off, or
    the gradient or the loss is scaled.
    """
    cell = resolve(dataclasses.replace(cell, precision="fp32"))
    workload = setup.start_workload(cell)
    parallel = setup.make_parallel(cell)
    device = devices.current(cell)
    build = partial(
        parallel.build, workload, None, seed=cell.seed, dtype=torch.float32, device=device
    )
    batch = workload.batch(0, shard=0, num_shards=1)
    plain = build()
    cast = build(autocast=autocast)
    losses = [part.gradient(batch) for part in (cast, plain)]
    loss, exact = (read_loss(each) for each in losses if each is not None)
    bound = BF16_ROUNDING * len(workload.layers())
    kept = cast.params.dtype == cast.grad.dtype == torch.float32
    different = count_different(cast.grad, plain.grad)
    apart = [
        relative(scale * cast.grad - plain.grad, plain.grad),
        abs(loss_scale * loss / exact - 1),
    ]
    value = max(apart) if different and kept and all(map(math.isfinite, apart)) else 1.0
    elements = f"{different} of {plain.grad.numel()} elements differ by {apart[0]:.3g}"
    return Figure(value, bound, f"{elements}, the loss {loss} by {apart[1]:.3g}, {cast.grad.dtype}")


class _Broken:
    """A part whose announcements pass through `how(ready)`, or whose gradient keeps old values."""

    def __init__(self, part: Part, how: str) -> None:
        self._part = part
        self._how = how

    def gradient(self, batch: Batch, ready: Any = None) -> Any:
        if self._how == "keeps":
            kept = self._part.grad[:3].clone()
            loss = self._part.gradient(batch, ready)
            self._part.grad[:3] = kept
            return loss
        slices: list[tuple[int, int]] = []
        if self._how == "early":  # the slice is announced before its gradient is there
            for start, stop in ((0, self._part.grad.numel()),):
                ready(start, stop)
            return self._part.gradient(batch)
        loss = self._part.gradient(batch, lambda start, stop: slices.append((start, stop)))
        for start, stop in sorted(slices) if self._how == "forwards" else slices[1:]:
            ready(start, stop)
        return loss


def _broken(how: str) -> Wrap:
    """The wrapper that breaks a part in this way."""
    return lambda part: _Broken(part, how)


def _data(cell: Cell) -> bool:
    """Whether replicas are one rank each."""
    return cell.parallel == "data"


CELLS = cases.ONE_REPLICA
LAWS = (
    Law(
        "announced slices are the gradient",
        announced_is_the_gradient,
        _data,
        (
            Control(
                "slices are announced too early",
                partial(announced_is_the_gradient, wrap=_broken("early")),
            ),
            Control(
                "a slice is not announced",
                partial(announced_is_the_gradient, wrap=_broken("skips")),
            ),
        ),
    ),
    Law(
        "slices cover the vector once, backwards",
        slices_cover_backwards,
        _data,
        (
            Control(
                "slices are announced forwards",
                partial(slices_cover_backwards, wrap=_broken("forwards")),
            ),
            Control(
                "a slice is not announced", partial(slices_cover_backwards, wrap=_broken("skips"))
            ),
        ),
    ),
    Law(
        "an unused parameter has gradient 0",
        unused_is_zero,
        _data,
        (Control("old values are kept", partial(unused_is_zero, wrap=_broken("keeps"))),),
    ),
    Law(
        "a bf16 gradient is the fp32 one up to bfloat16's roundings, and is rounded",
        bf16_is_close,
        lambda cell: _data(cell) and cell.precision == "fp32",
        (
            Control("autocast is not on", partial(bf16_is_close, autocast=False)),
            Control("the gradient is scaled", partial(bf16_is_close, scale=0.5)),
            Control("the loss is scaled", partial(bf16_is_close, loss_scale=0.5)),
        ),
    ),
)
