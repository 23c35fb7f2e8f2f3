"""Uniform quantisation to 8 or 4 bits, for `int8` and for strategies that quantise by themselves.

Per tensor the range [min, max] is cut into 2^bits - 1 steps (Alistarh et al. 2017, QSGD, here
rounded to the nearest): |error| <= range / (2^bits - 1), in fact half of it. Quantised vectors are
never added (100 + 100 = -56 in int8): on `direct` the owner of a chunk decodes, adds, divides and
encodes the mean once more (two hops, two errors); elsewhere everybody gathers everybody's vector
(one hop), or workers push to a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchsuite.comm import Traffic
from benchsuite.compression import Codec, Gathered, pieces_of
from benchsuite.topology import Topology, bounds
from benchsuite.workload import Shapes

RANGE_BYTES = 8  # the smallest value and the step of one tensor, float32 each

# A step below it has no reciprocal in float32: 1 / step would be infinite, and 0 times that NaN.
SMALLEST = torch.finfo(torch.float32).tiny


def quantised_bytes(pieces: Sequence[int], bits: int) -> int:
    """Bytes of an encoded vector: the ranges of all tensors, then the levels of all elements."""
    ranges_bytes = RANGE_BYTES * len(pieces)
    levels_bytes = -(-sum(pieces) * bits // 8)  # rounded up to a whole byte

    return ranges_bytes + levels_bytes


class Quantiser:
    """The codec of one vector: on the wire stand a range per tensor, then `bits` per element.

    `pieces` are the lengths of the tensors that the vector is made of. The memory of the wire and
    of the levels is kept from one vector to the next, because fresh memory of that size costs more
    than the arithmetic.
    """

    def __init__(self, pieces: Sequence[int], bits: int) -> None:
        assert bits in (4, 8)

        self._pieces = list(pieces)
        self._size = sum(pieces)  # P
        self._bits = bits
        self._steps = 2**bits - 1

        self.num_bytes = quantised_bytes(pieces, bits)
        self._ranges_bytes = RANGE_BYTES * len(pieces)
        self._wire = torch.empty(self.num_bytes, dtype=torch.uint8)

        # A level of 8 bits is a byte of the wire. Levels of 4 bits are made apart, then packed.
        if bits == 8:
            self._levels = self._wire[self._ranges_bytes :]
        else:
            self._levels = torch.empty(self._size, dtype=torch.uint8)

        self._scratch: Tensor | None = None  # (P,), made when the first vector tells its dtype

    def encode(self, flat: Tensor) -> Tensor:
        """The bytes to send for a vector (P,); the next call writes over them.

        level = round((x - low) / step), with step = (high - low) / (2^bits - 1) of x's tensor.
        """
        if not self._pieces:
            return self._wire

        if self._scratch is None:
            self._scratch = torch.empty_like(flat)

        # The ranges, in float64: high - low of two large float32 would overflow.
        ranges = [torch.aminmax(piece) for piece in flat.split(self._pieces)]
        low = torch.stack([found.min for found in ranges]).double()  # (tensors,)
        high = torch.stack([found.max for found in ranges]).double()  # (tensors,)
        step = (high - low) / self._steps
        header = torch.stack([low, step], dim=1).float()  # (tensors, 2)
        self._wire[: self._ranges_bytes].view(torch.float32).copy_(header.flatten())

        # Levels are made with the float32 numbers of the header, which the receiver has too.
        lows, steps = header.double().t().tolist()
        inverses = [1 / step if step > SMALLEST else 0.0 for step in steps]
        pieces = self._scratch.copy_(flat).split(self._pieces)
        torch._foreach_sub_(pieces, lows)
        torch._foreach_mul_(pieces, inverses)
        self._levels.copy_(self._scratch.round_().clamp_(0, self._steps))  # (P,)

        # Two levels of 4 bits share a byte, the even element in its lower half.
        if self._bits == 4:
            packed = self._wire[self._ranges_bytes :]
            odd = self._levels[1::2]
            packed.copy_(self._levels[::2])
            packed[: odd.numel()].bitwise_or_(odd << 4)

        return self._wire

    def decode(self, wire: Tensor, out: Tensor) -> None:
        """Writes low + step level of every element into `out` (P,)."""
        if not self._pieces:
            return

        # A copy: the row of another rank may begin at a byte where no float32 can stand.
        header = wire[: self._ranges_bytes].clone().view(torch.float32)  # (2 tensors,)
        lows = header[::2].tolist()
        steps = header[1::2].tolist()

        # The levels, one byte each.
        packed = wire[self._ranges_bytes :]

        if self._bits == 8:
            out.copy_(packed)
        else:
            out[::2] = packed & 15
            out[1::2] = (packed >> 4)[: self._size // 2]

        # Every tensor by its own range.
        pieces = out.split(self._pieces)
        torch._foreach_mul_(pieces, steps)
        torch._foreach_add_(pieces, lows)


class Quantised:
    """What a `Compression` of 8 or of 4 bits does; its own file adds the options and the name.

    Where the topology gives every chunk of the vector an owner (`scatters`), levels are averaged in
    two hops; on all others every worker gathers every other's vector.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.nominal_ratio = bits / 32

    def start(self, shapes: Shapes, *, seed: int) -> None:
        """Keeps the lengths of the tensors; memory is made when the first vector comes."""
        self._pieces = pieces_of(shapes)
        self._gathered = Gathered(partial(self.codec, self._pieces))

        # Where chunks have owners: a codec for each chunk, and one decoded chunk of this rank.
        self._owners: list[Quantiser] = []
        self._one: Tensor

    def mean(self, flat: Tensor, topology: Topology) -> None:
        """The quantised mean of `flat` (P,) over the workers, in place, the same bits on all."""
        if topology.scatters:
            self._by_owners(flat, topology)
            return

        self._gathered.mean(flat, topology)

    def _by_owners(self, flat: Tensor, topology: Topology) -> None:
        """The mean in two hops: chunk r of everybody goes to rank r, its mean to everybody.

        Levels cannot be added, so the owner decodes each worker's chunk, adds, divides by N and
        encodes the mean once more. That is a second error, also in its own copy: the owner decodes
        what it sent, or its parameters would drift away from the others'.
        """
        size = topology.num_workers
        rank = topology.rank  # type: ignore[attr-defined]  # of `direct`
        chunks = [flat[start:stop] for start, stop in bounds(flat.numel(), size)]
        mine = chunks[rank]

        if not self._owners:
            self._owners = [
                Quantiser(pieces, self.bits) for pieces in _chunk_pieces(self._pieces, size)
            ]

            self._one = torch.empty_like(mine)

        # The first hop: every worker's version of my chunk, added in rank order.
        codec = self._owners[rank]
        wires = [owner.encode(chunk) for owner, chunk in zip(self._owners, chunks, strict=True)]
        mine.zero_()

        for wire in topology.scatter(wires):  # type: ignore[attr-defined]
            codec.decode(wire, self._one)
            mine.add_(self._one)

        # The second hop: the means of all chunks.
        wire = codec.encode(mine.div_(size))
        rows = topology.gather(wire, [owner.num_bytes for owner in self._owners])  # type: ignore[call-arg]

        for owner, chunk, row in zip(self._owners, chunks, rows, strict=True):
            owner.decode(row, chunk)

    def codec(self, pieces: Sequence[int], dtype: torch.dtype, *, feedback: bool = True) -> Codec:
        """How one vector is encoded; nothing is kept of the error, so `feedback` has no effect."""
        return Quantiser(pieces, self.bits)

    def settle(self, mean: Tensor) -> None:
        """Leaves the mean as it is: the decoded mean is what the paper steps with."""

    def wire_bytes(self, pieces: Sequence[int], itemsize: int) -> int:
        """Bytes of one encoded vector; they do not depend on the size of its elements."""
        return quantised_bytes(pieces, self.bits)

    def predicted_traffic(
        self,
        shapes: Shapes,
        itemsize: int,
        topology: Topology,
        *,
        num_workers: int,
        num_servers: int = 0,
    ) -> Traffic:
        """Traffic of one mean.

        It is a gather of whole vectors, or a scatter and a gather of chunks, whose encoded sizes
        differ by their numbers of tensors.
        """
        pieces = pieces_of(shapes)

        if not topology.scatters:
            return topology.predicted_gather(
                quantised_bytes(pieces, self.bits), num_workers=num_workers
            )

        sizes = [quantised_bytes(chunk, self.bits) for chunk in _chunk_pieces(pieces, num_workers)]
        scattered: Traffic = topology.predicted_scatter(sizes)  # type: ignore[attr-defined]

        return scattered + topology.predicted_gather(sizes, num_workers=num_workers)  # type: ignore[arg-type]


def _chunk_pieces(pieces: Sequence[int], size: int) -> list[list[int]]:
    """The lengths of the tensors' parts in each of `size` chunks of the vector.

    A chunk's border may lie inside a tensor, which then has a range of its own in both chunks.
    """
    shapes = {str(number): torch.Size([piece]) for number, piece in enumerate(pieces)}
    return [pieces_of(shapes, start, stop) for start, stop in bounds(sum(pieces), size)]
