"""Uniform quantisation to 8 or 4 bits: what `int8` and the low-bit outer gradient of `diloco` share.

Per tensor the range [min, max] is cut into 2^bits - 1 steps (Alistarh et al. 2017, QSGD, here rounded to the nearest):
|error| <= range / (2^bits - 1), in fact half of it. Quantised vectors are never added (100 + 100 = -56 in int8): on
`direct` the owner of a chunk decodes, adds, divides and encodes the mean once more (two hops, two errors); elsewhere
everybody gathers everybody's vector (one hop), or workers push to a server.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchsuite.comm import Traffic
from benchsuite.compression import Codec, gathered_mean, pieces_of
from benchsuite.topology import Topology, bounds
from benchsuite.workload import Shapes

RANGE_BYTES = 8  # min and step, float32 each


def quantised_bytes(pieces: Sequence[int], bits: int) -> int:
    """Of an encoded vector; every tensor begins with its range and on a byte of its own."""
    return sum(RANGE_BYTES + -(-size * bits // 8) for size in pieces)


class Quantiser:
    """A range per tensor, then `bits` per element."""

    def __init__(self, pieces: Sequence[int], bits: int) -> None:
        assert bits in (4, 8)
        self._pieces, self._bits, self._steps = list(pieces), bits, 2**bits - 1
        self.num_bytes = quantised_bytes(pieces, bits)
        self._wire = torch.empty(self.num_bytes, dtype=torch.uint8)
        self._sizes = [quantised_bytes([size], bits) for size in pieces]

    def encode(self, flat: Tensor) -> Tensor:
        for piece, place in zip(flat.split(self._pieces), self._wire.split(self._sizes), strict=True):
            low, high = float(piece.min()), float(piece.max())
            header = torch.tensor([low, (high - low) / self._steps], dtype=torch.float32)
            place[:RANGE_BYTES].copy_(header.view(torch.uint8))
            low, step = header.tolist()
            if step > 0:
                levels = ((piece - low) / step).round_().clamp_(0, self._steps)
            else:
                levels = torch.zeros_like(piece)
            self._pack(levels.to(torch.uint8), place[RANGE_BYTES:])
        return self._wire

    def decode(self, wire: Tensor, out: Tensor) -> None:
        for piece, place in zip(out.split(self._pieces), wire.split(self._sizes), strict=True):
            low, step = place[:RANGE_BYTES].clone().view(torch.float32).tolist()
            piece.copy_(self._unpack(place[RANGE_BYTES:], piece.numel())).mul_(step).add_(low)

    def _pack(self, levels: Tensor, place: Tensor) -> None:
        if self._bits == 8:
            place.copy_(levels)
            return
        place.copy_(levels[::2])
        odd = levels[1::2]
        place[: odd.numel()].bitwise_or_(odd << 4)

    def _unpack(self, place: Tensor, size: int) -> Tensor:
        if self._bits == 8:
            return place
        return torch.stack([place & 15, place >> 4], dim=1).flatten()[:size]


class Quantised:
    """A `Compression` of so many bits."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.nominal_ratio = bits / 32

    def start(self, shapes: Shapes, *, seed: int) -> None:
        self._pieces = pieces_of(shapes)

    def mean(self, flat: Tensor, topology: Topology) -> None:
        if hasattr(topology, "scatter"):
            self._by_owners(flat, topology)
        else:
            gathered_mean(flat, topology, Quantiser(self._pieces, self.bits))

    def _by_owners(self, flat: Tensor, topology: Topology) -> None:
        """Chunk r of everybody to rank r, the mean of it back to everybody."""
        size, rank = topology.num_workers, topology.rank  # type: ignore[attr-defined]  # of `direct`
        chunks = [slice(start, stop) for start, stop in bounds(flat.numel(), size)]
        codecs = [Quantiser(_cut(self._pieces, chunk), self.bits) for chunk in chunks]
        wires = [codec.encode(flat[chunk]) for codec, chunk in zip(codecs, chunks, strict=True)]
        mine = flat[chunks[rank]]
        one = torch.empty_like(mine)
        mine.zero_()
        for wire in topology.scatter(wires):  # type: ignore[attr-defined]
            codecs[rank].decode(wire, one)
            mine.add_(one)
        sizes = [codec.num_bytes for codec in codecs]
        rows = topology.gather(codecs[rank].encode(mine.div_(size)), sizes)  # type: ignore[call-arg]
        for codec, chunk, wire in zip(codecs, chunks, rows, strict=True):
            codec.decode(wire, flat[chunk])

    def codec(self, pieces: Sequence[int], dtype: torch.dtype, *, feedback: bool = True) -> Codec:
        return Quantiser(pieces, self.bits)

    def settle(self, mean: Tensor) -> None:
        """A mean stays what it is."""

    def wire_bytes(self, pieces: Sequence[int], itemsize: int) -> int:
        return quantised_bytes(pieces, self.bits)

    def predicted_traffic(
        self, shapes: Shapes, itemsize: int, topology: Topology, *, num_workers: int, num_servers: int = 0
    ) -> Traffic:
        pieces = pieces_of(shapes)
        if not hasattr(topology, "scatter"):
            return topology.predicted_gather(quantised_bytes(pieces, self.bits), num_workers=num_workers)
        traffic = Traffic()
        for owner, (start, stop) in enumerate(bounds(sum(pieces), num_workers)):
            size = quantised_bytes(_cut(pieces, slice(start, stop)), self.bits)
            for rank in range(num_workers if size else 0):
                if rank != owner:
                    traffic.add(rank, owner, size)
                    traffic.add(owner, rank, size)
        return traffic


def _cut(pieces: Sequence[int], chunk: slice) -> list[int]:
    return pieces_of({str(number): torch.Size([size]) for number, size in enumerate(pieces)}, chunk.start, chunk.stop)
