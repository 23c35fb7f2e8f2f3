"""Sums inside one host through shared memory: no vector is sent, every rank adds its part of it for
all.

A vector is cut into chunks of 1 MiB and each chunk among the ranks: rank r adds the ranks' shares
of part r, in rank order, in pieces that stay in its cache. Where the vector lives in the segment
(`slot`), all that happens is: barrier, add the own part and write it to every slot, barrier.
Otherwise the other ranks' parts are copied in, barrier, the own part is added into the host's
result, barrier, the other parts are copied out; from 16 MiB on chunk by chunk, so that while chunk
k is copied in, k-1 is added and k-2 copied out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchsuite.comm import Comm, Edge, Traffic
from benchsuite.topology import bounds, segments

CHUNK_BYTES = 2**20
PIPELINED_BYTES = 16 * 2**20
PAGE_BYTES = 4096  # slots begin on pages: two ranks never write one cache line

Across = Callable[
    [Tensor], None
]  # what the host's first rank does with the host's sum, before everybody gets it


class _InPlace(NamedTuple):
    """A vector in the slots."""

    rows: list[Tensor]  # whole, by rank
    own: list[list[Tensor]]  # the own part of each chunk, by rank


class _Chunk(NamedTuple):
    """One chunk of a vector, its views of the shared memory made once. Ranges are those of the
    vector.
    """

    into: list[tuple[int, int, Tensor]]  # others' parts: where this rank's share of them is put
    own: tuple[int, int]
    shares: list[
        Tensor | None
    ]  # of the own part, by rank; None: this rank's, straight from its vector
    total: Tensor  # the own part of the host's result
    out: list[tuple[int, int, Tensor]]  # others' parts of the result


class HostMemory:
    """Of the ranks of `comm`, which share a host. All of them call the same methods in the same
    order.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._rank = comm.rank
        self._size = comm.size
        self._owned: list[tuple[int, Tensor]] = []  # address of this rank's slot, (ranks, numel)
        self._stages: dict[
            tuple[int, torch.dtype], Tensor
        ] = {}  # (ranks + 1, length): the last row is the result
        self._chunks: dict[tuple[int, torch.dtype], list[_Chunk]] = {}
        self._places: dict[tuple[int, int, int], _InPlace] = {}
        self._counts: dict[
            tuple[int, int], list[tuple[Edge, int]]
        ] = {}  # (numel, itemsize) -> what a total counts

    def slot(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory for a vector of this rank that the others can read and write."""
        slots = self._shared("slots", self._size, numel, dtype)
        mine = slots[self._rank]
        self._owned.append((mine.data_ptr(), slots))

        return mine

    def total(self, flat: Tensor, *, divisor: int, across: Across | None) -> None:
        """Replaces `flat` by the sum over the host's ranks, divided; `across` divides itself."""
        self._count(flat, alone=across is None)
        place = self.place_of(flat)
        if place is not None:
            self._in_place(place, divisor, across)
        elif across is None and flat.numel() * flat.element_size() >= PIPELINED_BYTES:
            self._pipelined(flat, divisor)
        else:
            self._staged(flat, divisor, across)

    def place_of(self, flat: Tensor) -> _InPlace | None:
        """Where `flat` lies in this rank's slots; None: it lies elsewhere."""
        address = flat.data_ptr()
        numel = flat.numel()
        itemsize = flat.element_size()

        for number, (begin, slots) in enumerate(self._owned):
            start = (address - begin) // itemsize
            if 0 <= start <= slots.shape[1] - numel and slots.dtype == flat.dtype:
                key = (number, start, numel)
                if key not in self._places:
                    rows = [slot[start : start + numel] for slot in slots]
                    own = own_ranges(numel, itemsize, self._size, self._rank)
                    self._places[key] = _InPlace(rows, [[row[a:b] for row in rows] for a, b in own])

                return self._places[key]

        return None

    def _in_place(self, place: _InPlace, divisor: int, across: Across | None) -> None:
        comm = self._comm
        first = place.rows[0]
        comm.barrier()

        for total, *others in place.own:
            for share in others:
                total.add_(share)

            if across is None:
                total.div_(divisor)
                for share in others:
                    share.copy_(total)

        comm.barrier()
        if across is None:
            return

        if self._rank == 0:
            across(first)

        comm.barrier()
        if self._rank > 0:
            place.rows[self._rank].copy_(first)

        comm.barrier()  # nobody changes what others still copy

    def _staged(self, flat: Tensor, divisor: int, across: Across | None) -> None:
        comm = self._comm
        stage = self._stage(flat.numel(), flat.dtype)
        key = (flat.numel(), flat.dtype)
        if key not in self._chunks:
            ranges = segments(0, flat.numel(), chunk_length(flat.element_size()))
            self._chunks[key] = [self._chunk(stage[:, start:stop], start) for start, stop in ranges]

        chunks = self._chunks[key]

        for chunk in chunks:
            self._copy_in(flat, chunk)

        comm.barrier()

        for chunk in chunks:
            self._add(flat, chunk, divisor if across is None else 1)

        comm.barrier()
        if across is not None:
            if self._rank == 0:
                across(stage[self._size])

            comm.barrier()
            flat.copy_(stage[self._size])

            return

        for chunk in chunks:
            self._copy_out(flat, chunk)

    def _pipelined(self, flat: Tensor, divisor: int) -> None:
        """Two chunks' worth of memory: what step k writes was read for the last time in step
        k-1.
        """
        length = chunk_length(flat.element_size())
        stage = self._stage(2 * length, flat.dtype)
        key = (flat.numel(), flat.dtype)
        if key not in self._chunks:
            self._chunks[key] = [
                self._chunk(stage.narrow(1, number % 2 * length, stop - start), start)
                for number, (start, stop) in enumerate(segments(0, flat.numel(), length))
            ]

        chunks = self._chunks[key]

        for step in range(len(chunks) + 2):
            if step:
                self._comm.barrier()

            if step < len(chunks):
                self._copy_in(flat, chunks[step])

            if 1 <= step <= len(chunks):
                self._add(flat, chunks[step - 1], divisor)

            if step >= 2:
                self._copy_out(flat, chunks[step - 2])

    # -- one chunk ---------------------------------------------------------------------------------

    def _chunk(self, stage: Tensor, start: int) -> _Chunk:
        """The chunk at `start` of a vector; stage: its place in the memory, (ranks + 1, length)."""
        mine = stage[self._rank]
        result = stage[self._size]
        low, high = bounds(stage.shape[1], self._size)[self._rank]
        others = [(a, b) for a, b in ((0, low), (high, stage.shape[1])) if b > a]

        return _Chunk(
            into=[(start + a, start + b, mine[a:b]) for a, b in others],
            own=(start + low, start + high),
            shares=[
                None if rank == self._rank else stage[rank, low:high] for rank in range(self._size)
            ],
            total=result[low:high],
            out=[(start + a, start + b, result[a:b]) for a, b in others],
        )

    def _copy_in(self, flat: Tensor, chunk: _Chunk) -> None:
        for start, stop, place in chunk.into:
            place.copy_(flat[start:stop])

    def _add(self, flat: Tensor, chunk: _Chunk, divisor: int) -> None:
        """The own part: shares in rank order."""
        mine = flat[chunk.own[0] : chunk.own[1]]
        total = chunk.total
        first, second, *others = (mine if share is None else share for share in chunk.shares)
        torch.add(first, second, out=total)

        for share in others:
            total.add_(share)

        if divisor > 1:
            total.div_(divisor)

        mine.copy_(total)

    def _copy_out(self, flat: Tensor, chunk: _Chunk) -> None:
        for start, stop, result in chunk.out:
            flat[start:stop].copy_(result)

    # -- book-keeping and memory -------------------------------------------------------------------

    def _count(self, flat: Tensor, *, alone: bool) -> None:
        key = (flat.numel(), flat.element_size())
        if key not in self._counts:
            mine = host_traffic(*key, self._comm.world_ranks, alone=alone, of=[self._rank])
            self._counts[key] = list(mine.shm.items())

        for edge, num_bytes in self._counts[key]:
            self._comm.traffic.add_shm(*edge, num_bytes)

    def _stage(self, length: int, dtype: torch.dtype) -> Tensor:
        key = (length, dtype)
        if key not in self._stages:
            self._stages[key] = self._shared("stage", self._size + 1, length, dtype)

        return self._stages[key]

    def _shared(self, name: str, count: int, numel: int, dtype: torch.dtype) -> Tensor:
        """(count, numel), every row on pages of its own."""
        page = PAGE_BYTES // dtype.itemsize
        stride = -(-numel // page) * page

        return self._comm.shared(name, count * stride, dtype).view(count, stride)[:, :numel]


def chunk_length(itemsize: int) -> int:
    """Elements of a chunk."""
    return CHUNK_BYTES // itemsize


def own_ranges(numel: int, itemsize: int, size: int, rank: int) -> list[tuple[int, int]]:
    """Part `rank` of every chunk; empty ones are left out."""
    found = []
    for start, stop in segments(0, numel, chunk_length(itemsize)):
        low, high = bounds(stop - start, size)[rank]
        if high > low:
            found.append((start + low, start + high))

    return found


def part_bytes(numel: int, itemsize: int, size: int) -> list[int]:
    """Bytes of each rank's part."""
    return [
        sum(stop - start for start, stop in own_ranges(numel, itemsize, size, rank)) * itemsize
        for rank in range(size)
    ]


def host_traffic(
    numel: int, itemsize: int, ranks: Sequence[int], *, alone: bool, of: Sequence[int] | None = None
) -> Traffic:
    """What one total hands over inside a host of these ranks. `alone`: there is no other host.

    Part i of rank j's vector is read by i, and j gets the result of it: 2 (n-1) M for n ranks. With
    other hosts the sum is gathered at the first rank, and all get it from there: (n-1)/n M more.
    `of`: what only these positions do.
    """
    traffic = Traffic()
    size = len(ranks)
    parts = part_bytes(numel, itemsize, size)

    for i in range(size) if of is None else of:
        for j in range(size if parts[i] else 0):
            if i != j:
                traffic.add_shm(ranks[j], ranks[i], parts[i])

            if i != j and (alone or j == 0):
                traffic.add_shm(ranks[i], ranks[j], parts[i])

        if i and not alone and numel:
            traffic.add_shm(ranks[0], ranks[i], numel * itemsize)

    return traffic
