"""Laws of codecs: one vector's way onto the wire and back, as a push or a graph's edge takes it.

No ranks are needed. The vectors are slices of an odd number of elements that cut through tensors,
and among the tensors are some of one element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchsuite import rules
from benchsuite.compression import Codec, Compression, pieces_of
from benchsuite.compression.quantise import Quantised
from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness.cases import Asked, Cells, subject_of, tiny
from benchsuite.laws.harness.runs import count_different, relative, worst
from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell
from benchsuite.topology import bounds
from benchsuite.worker import setup
from benchsuite.workload import Shapes, numel

SHAPES: Shapes = {
    "a": torch.Size([7, 11]),
    "b": torch.Size([13]),
    "c": torch.Size([5, 3, 2, 2]),
    "d": torch.Size([1]),
    "e": torch.Size([12, 9]),
}
ROUNDS = 20
FLOAT64 = 1e-12
HALF_A_STEP = 0.501  # half a step is rounding to the nearest; the ranges travel as float32

Twin = Callable[[Codec], Any]  # makes a broken codec of a whole one


def slices() -> Iterator[tuple[int, int]]:
    """The slices of 1 to 4 servers, and some around the border of a byte."""
    size = numel(SHAPES)
    for servers in (1, 2, 3, 4):
        yield from bounds(size, servers)
    yield from ((0, stop) for stop in (1, 7, 8, 9, 15, 17))


def vector(seed: int, size: int, dtype: torch.dtype) -> Tensor:
    """A vector of numbers around zero, others for every seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def _compression(cell: Cell) -> Compression:
    """A fresh instance of the cell's compression."""
    made: Compression = setup.make(
        "compression", cell.compression, setup.options_for(cell, "compression")
    )
    made.start(SHAPES, seed=cell.seed)
    return made


def wire_is_as_told(make_ranks: MakeRanks, cell: Cell, *, twin: Twin | None = None) -> Figure:
    """`encode` returns as many bytes as were told before, and leaves the vector alone.

    The bytes say the same wherever they lie, because in a row of a gather they may begin anywhere.
    Bound: exact. The twins send one byte more or work in the vector that they were given.
    """
    compression = _compression(cell)
    dtype = setup.DTYPES[cell.precision]
    wrong = 0
    where = ""
    for start, stop in [*slices(), (5, 5)]:
        pieces = pieces_of(SHAPES, start, stop)
        codec = compression.codec(pieces, dtype)
        codec = codec if twin is None else twin(codec)
        told = compression.wire_bytes(pieces, dtype.itemsize)
        flat = vector(start, stop - start, dtype)
        before = flat.clone()
        wire = codec.encode(flat)
        rows = torch.cat([torch.zeros(3, dtype=torch.uint8), wire])
        here = torch.empty_like(flat)
        there = torch.empty_like(flat)
        codec.decode(wire, here)
        codec.decode(rows[3:], there)
        gap = (
            abs(wire.numel() - told) + abs(codec.num_bytes - told) + (wire.dtype is not torch.uint8)
        )
        gap += count_different(flat, before) + count_different(here, there)
        if gap and not where:
            where = f"; [{start}, {stop}): {wire.numel()} bytes, {told} told"
        wrong += gap
    return Figure(wrong, 0, f"{wrong} bytes or elements wrong{where}, {cell.label}")


def sent_and_left_are_the_gradients(
    make_ranks: MakeRanks, cell: Cell, *, feedback: bool = True, twin: Twin | None = None
) -> Figure:
    """Error feedback: what a worker sent in all and what it has left add up to its gradients.

    Bound: a relative error of 1e-12. The twin drops what was left out.
    """
    compression = _compression(cell)
    dtype = setup.DTYPES[cell.precision]
    figures = []
    for start, stop in slices():
        codec: Any = compression.codec(pieces_of(SHAPES, start, stop), dtype, feedback=feedback)
        codec = codec if twin is None else twin(codec)
        given = torch.zeros(stop - start, dtype=dtype)
        sent = torch.zeros(stop - start, dtype=dtype)
        one = torch.empty_like(sent)
        for round_ in range(ROUNDS):
            flat = vector(100 * start + round_, stop - start, dtype)
            given += flat
            codec.decode(codec.encode(flat), one)
            sent += one
        left = torch.zeros_like(sent) if codec.residual is None else codec.residual
        figures.append((relative(sent + left - given, given), f"[{start}, {stop})"))
    value, where = worst(figures)
    return Figure(
        value, FLOAT64, f"||sent + left - given|| / ||given|| after {ROUNDS}, {where}, {cell.label}"
    )


def votes_come_back(make_ranks: MakeRanks, cell: Cell, *, twin: Twin | None = None) -> Figure:
    """Packed votes come back whatever their number is: +1 where an element is >= 0, else -1.

    Bound: exact. The twins flip one bit or read every bit one place further on.
    """
    compression = _compression(cell)
    dtype = setup.DTYPES[cell.precision]
    different = 0
    for size in (*range(1, 26), 1001):
        codec = compression.codec([size], dtype)
        codec = codec if twin is None else twin(codec)
        flat = vector(size, size, dtype)
        flat[:: max(3, size // 4)] = 0.0
        back = torch.empty_like(flat)
        codec.decode(codec.encode(flat), back)
        different += count_different(back, torch.where(flat >= 0, 1.0, -1.0).to(dtype))
    return Figure(different, 0, f"{different} votes changed on the way, {cell.label}")


def within_half_a_step(make_ranks: MakeRanks, cell: Cell, *, twin: Twin | None = None) -> Figure:
    """Quantised to 8 or 4 bits, each element comes back within half a step.

    A step is range / (2^bits - 1) of the element's tensor. Bound: 0.501 steps, for ranges travel as
    float32. The twin loses the lowest bit of every level.
    """
    dtype = setup.DTYPES[cell.precision]
    figures = []
    for bits in (8, 4):
        for start, stop in slices():
            pieces = pieces_of(SHAPES, start, stop)
            codec = Quantised(bits).codec(pieces, dtype)
            codec = codec if twin is None else twin(codec)
            for shift in (0.0, 3.0):
                flat = vector(start + bits, stop - start, dtype) + shift
                back = torch.empty_like(flat)
                codec.decode(codec.encode(flat), back)
                figures += [
                    (_steps_off(mine, theirs, bits), f"{bits} bits, [{start}, {stop})")
                    for mine, theirs in zip(back.split(pieces), flat.split(pieces), strict=True)
                ]
    value, where = worst(figures)
    return Figure(value, HALF_A_STEP, f"steps off at most, {where}, {cell.label}")


def _steps_off(mine: Tensor, theirs: Tensor, bits: int) -> float:
    """The largest error in steps of each tensor's range.

    The step of a tensor with one value is a unit of that value's last place.
    """
    step = float(theirs.max() - theirs.min()) / (2**bits - 1) or 1e-6 * float(theirs.abs().max())
    return float((mine - theirs).abs().max()) / step


def stays_not_finite(make_ranks: MakeRanks, cell: Cell, *, twin: Twin | None = None) -> Figure:
    """A vector with a NaN or an infinity is encoded without an error, and is not finite afterwards.

    Bound: exact. The twin puts a number in its place.
    """
    compression = _compression(cell)
    dtype = setup.DTYPES[cell.precision]
    lost = 0
    cases = 0
    for start, stop in slices():
        for value in (float("nan"), float("inf"), -float("inf")):
            codec = compression.codec(pieces_of(SHAPES, start, stop), dtype)
            codec = codec if twin is None else twin(codec)
            flat = vector(start, stop - start, dtype)
            flat[len(flat) // 2] = value
            back = torch.empty_like(flat)
            codec.decode(codec.encode(flat), back)
            lost = lost + bool(torch.isfinite(back).all())
            cases = cases + 1
    return Figure(lost, 0, f"{lost} of {cases} vectors came back finite, {cell.label}")


# -- broken twins ----------------------------------------------------------------------------------


class _Broken:
    """A codec that does as the whole one does; its twins override one method."""

    def __init__(self, whole: Any) -> None:
        self._whole = whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def encode(self, flat: Tensor) -> Tensor:
        wire: Tensor = self._whole.encode(flat)
        return wire

    def decode(self, wire: Tensor, out: Tensor) -> None:
        self._whole.decode(wire, out)


class _Longer(_Broken):
    """A codec that sends one byte more than it says."""

    def encode(self, flat: Tensor) -> Tensor:
        return torch.cat([super().encode(flat), torch.zeros(1, dtype=torch.uint8)])

    def decode(self, wire: Tensor, out: Tensor) -> None:
        super().decode(wire[:-1], out)


class _Careless(_Broken):
    """A codec that works in the vector that it was given."""

    def encode(self, flat: Tensor) -> Tensor:
        wire = super().encode(flat)
        self.decode(wire, flat)
        return wire


class _Forgetful(_Broken):
    """A codec that drops what was left out."""

    def encode(self, flat: Tensor) -> Tensor:
        wire = super().encode(flat)
        self._whole.residual.zero_()
        return wire


class _BitFlipped(_Broken):
    """A codec that flips one bit of the last byte on the way."""

    def decode(self, wire: Tensor, out: Tensor) -> None:
        wire = wire.clone()
        wire[-1] ^= 128
        super().decode(wire, out)


class _BitsShifted(_Broken):
    """A codec that reads every bit one place further on."""

    def decode(self, wire: Tensor, out: Tensor) -> None:
        longer = torch.empty(out.numel() + 1, dtype=out.dtype)
        bits = torch.cat([wire, torch.zeros(1, dtype=torch.uint8)])
        super().decode(bits[: -(-len(longer) // 8)], longer)
        out.copy_(longer[1:])


class _Coarser(_Broken):
    """A codec that loses the lowest bit of every level."""

    def encode(self, flat: Tensor) -> Tensor:
        wire = super().encode(flat).clone()
        levels = wire[self._whole._ranges_bytes :]
        levels.bitwise_and_(254 if self._whole._bits == 8 else 0xEE)
        return wire


class _Masking(_Broken):
    """A codec that puts a number in the place of what is none."""

    def encode(self, flat: Tensor) -> Tensor:
        return super().encode(torch.nan_to_num(flat, nan=0.0, posinf=1.0, neginf=-1.0))


def _control(law: Callable[..., Figure], broken: str, compression: str, **how: Any) -> Control:
    on = {"compression": compression, "topology": "parameter_server", "servers": 1, "replicas": 2}
    return Control(broken, partial(law, **how), on)


def _cells(asked: Asked) -> list[Cell]:
    """A cell for every compression that a push can have."""
    if asked.sync or "parameter_server" not in asked.members("topology"):
        return []
    push: dict[str, Any] = {
        "topology": "parameter_server",
        "servers": 1,
        "replicas": 2,
        "clock": asked.clock,
    }
    names = asked.members("compression")
    made = [
        tiny(**push, compression=name, precision=precision)
        for name in names
        for precision in ("fp64", "fp32")
    ]
    return [cell for cell in made if cell.compression != "none" and not rules.validate(cell)]


def _is(*names: str) -> Callable[[Cell], bool]:
    return lambda cell: plugins.stem(cell.compression) in names


CELLS = Cells(_cells, lambda cell: f"an encoded vector, {subject_of(cell).rpartition(' ')[2]}")
LAWS = (
    Law(
        "a wire has the bytes that were told and may lie anywhere",
        wire_is_as_told,
        lambda cell: True,
        (
            _control(wire_is_as_told, "one byte more is sent", "int8", twin=_Longer),
            _control(wire_is_as_told, "the vector is worked in", "topk", twin=_Careless),
        ),
    ),
    Law(
        "sent and left over are what was given",
        sent_and_left_are_the_gradients,
        lambda cell: (
            plugins.stem(cell.compression) in ("topk", "ef_sign") and cell.precision == "fp64"
        ),
        (
            _control(sent_and_left_are_the_gradients, "no error feedback", "topk", twin=_Forgetful),
            _control(sent_and_left_are_the_gradients, "nothing is kept", "topk", feedback=False),
            _control(
                sent_and_left_are_the_gradients,
                "what is left over is dropped",
                "ef_sign",
                twin=_Forgetful,
            ),
            _control(
                sent_and_left_are_the_gradients,
                "one bit is flipped on the way",
                "ef_sign",
                twin=_BitFlipped,
            ),
        ),
    ),
    Law(
        "packed votes come back, whatever their number",
        votes_come_back,
        _is("sign"),
        (
            _control(votes_come_back, "one bit is flipped on the way", "sign", twin=_BitFlipped),
            _control(votes_come_back, "bits are shifted by one", "sign", twin=_BitsShifted),
        ),
    ),
    Law(
        "8 and 4 bits are off by half a step at most",
        within_half_a_step,
        _is("int8"),
        (_control(within_half_a_step, "the lowest bit is lost", "int8", twin=_Coarser),),
    ),
    Law(
        "what is not finite stays so, and is no error",
        stays_not_finite,
        _is("fp16", "bf16", "topk", "ef_sign", "int8"),
        (_control(stays_not_finite, "a number is put in its place", "topk", twin=_Masking),),
    ),
)
