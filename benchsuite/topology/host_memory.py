"""Sums inside one host through shared memory: nothing is sent, every rank adds its part for all.

A vector is cut into chunks of 1 MiB and each chunk among the ranks: rank r adds the ranks' shares
of part r, in rank order, in pieces that stay in its cache.

Where the vector lives in the shared segment (`slot`), a total is: barrier, add the own part and
write it to every slot, barrier. Otherwise it is staged: copy the other ranks' parts in, barrier,
add the own part into the host's result, barrier, copy the other parts out. From 16 MiB on this is
done chunk by chunk, so that while chunk k is copied in, k-1 is added and k-2 copied out.

Puts 0 bytes on the wire. 2 (n-1) M bytes go through shared memory in a host of n ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchsuite.comm import Comm, Edge, Traffic
from benchsuite.topology import bounds, segments

# A chunk: the shares of it that a rank adds stay in the rank's cache.
CHUNK_BYTES = 2**20

# From this size on a vector that has to be copied goes chunk by chunk.
PIPELINED_BYTES = 16 * 2**20

# Slots begin on pages, so that two ranks never write to one cache line.
PAGE_BYTES = 4096

# What the host's first rank does with the host's sum, before everybody gets it.
Across = Callable[[Tensor], None]


class _InPlace(NamedTuple):
    """A vector that lives in the slots of all ranks, at the same place of each."""

    rows: list[Tensor]
    """The whole vector of each rank, by rank."""

    own: list[list[Tensor]]
    """For each chunk the part that this rank adds: its share of every rank's vector, by rank."""


class _Chunk(NamedTuple):
    """One chunk of a vector, with its views of the shared memory made once.

    Ranges (start, stop) are those of the vector.
    """

    into: list[tuple[int, int, Tensor]]
    """Ranges that other ranks add, and where this rank puts its share of them."""

    own: tuple[int, int]
    """The range that this rank adds."""

    shares: list[Tensor | None]
    """What each rank has put in for the own range, by rank.

    None stands for this rank's own share, which is read straight from its vector.
    """

    total: Tensor
    """Where this rank writes the sum of the own range."""

    out: list[tuple[int, int, Tensor]]
    """Ranges that other ranks have added, and where their sums are."""


class HostMemory:
    """The shared memory of the ranks of `comm`, which are on one host.

    All of them must call the same methods in the same order: `slot` and `total` create segments
    and pass barriers together.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._rank = comm.rank
        self._size = comm.size

        # Address of this rank's slot, and the slots of all.                 (ranks, numel)
        self._owned: list[tuple[int, Tensor]] = []

        # Staging memory; the last row is the host's result.                 (ranks + 1, length)
        self._stages: dict[tuple[int, torch.dtype], Tensor] = {}

        # Views made at a vector's first total, by (numel, dtype) and by (slot, start, numel).
        self._chunks: dict[tuple[int, torch.dtype], list[_Chunk]] = {}
        self._places: dict[tuple[int, int, int], _InPlace] = {}

        # What one total counts as traffic, by (numel, itemsize).
        self._counts: dict[tuple[int, int], list[tuple[Edge, int]]] = {}

    def slot(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Gives memory for a vector of this rank that the others can read and write."""
        # One segment with a slot for each rank: all ranks ask for it together.
        slots = self._shared("slots", self._size, numel, dtype)
        mine = slots[self._rank]
        self._owned.append((mine.data_ptr(), slots))

        return mine

    def total(self, flat: Tensor, *, divisor: int, across: Across | None) -> None:
        """Replaces `flat` (P,) by its sum over the host's ranks, divided by `divisor`.

        `across`, where it is given, takes the host's sum to the other hosts and divides itself.
        """
        self._count(flat, alone=across is None)

        # In place where the vector lives in the slots. With other hosts the whole sum is needed
        # before anything is copied out, so nothing is gained chunk by chunk.
        place = self.place_of(flat)
        if place is not None:
            self._in_place(place, divisor, across)
        elif across is None and flat.numel() * flat.element_size() >= PIPELINED_BYTES:
            self._pipelined(flat, divisor)
        else:
            self._staged(flat, divisor, across)

    def place_of(self, flat: Tensor) -> _InPlace | None:
        """Finds `flat` in this rank's slots; None if it lies elsewhere."""
        address = flat.data_ptr()
        numel = flat.numel()
        itemsize = flat.element_size()

        for number, (begin, slots) in enumerate(self._owned):
            # The vector may be a slice of a slot: a bucket, for example.
            start = (address - begin) // itemsize
            if 0 <= start <= slots.shape[1] - numel and slots.dtype == flat.dtype:
                key = (number, start, numel)
                if key not in self._places:
                    rows = [slot[start : start + numel] for slot in slots]
                    ranges = own_ranges(numel, itemsize, self._size, self._rank)
                    own = [[row[a:b] for row in rows] for a, b in ranges]
                    self._places[key] = _InPlace(rows, own)

                return self._places[key]

        return None

    def _in_place(self, place: _InPlace, divisor: int, across: Across | None) -> None:
        """Adds the own part of the slots, where all vectors are already.

        The sum is made in rank 0's slot, and where there is no other host written to all slots by
        the rank that made it: nobody reads a part that another rank writes.
        """
        comm = self._comm
        first = place.rows[0]

        comm.barrier()  # all vectors are complete

        # Rank 0's share of the own part is where the sum is made.
        for total, *others in place.own:
            for share in others:
                total.add_(share)  # in rank order

            if across is None:
                total.div_(divisor)
                for share in others:
                    share.copy_(total)

        comm.barrier()  # all parts are added
        # Without other hosts every slot has the whole mean.
        if across is None:
            return

        # With other hosts the whole sum is needed in one place: rank 0's slot has it.
        if self._rank == 0:
            across(first)

        comm.barrier()  # the other hosts' sums are in
        if self._rank > 0:
            place.rows[self._rank].copy_(first)

        comm.barrier()  # or rank 0 would change what others still copy

    def _staged(self, flat: Tensor, divisor: int, across: Across | None) -> None:
        """Copies the whole vector in, adds the own part, copies the others' results out."""
        comm = self._comm
        stage = self._stage(flat.numel(), flat.dtype)  # (ranks + 1, P)
        key = (flat.numel(), flat.dtype)
        if key not in self._chunks:
            ranges = segments(0, flat.numel(), chunk_length(flat.element_size()))
            self._chunks[key] = [self._chunk(stage[:, start:stop], start) for start, stop in ranges]

        chunks = self._chunks[key]

        # Copying in, adding and copying out are three passes, with a barrier between them.
        for chunk in chunks:
            self._copy_in(flat, chunk)

        comm.barrier()  # all shares are in the stage

        for chunk in chunks:
            self._add(flat, chunk, divisor if across is None else 1)

        comm.barrier()  # all parts of the result are there

        # No barrier is needed behind the copies below: the next total's first writes go to shares,
        # which nobody reads any more, and its results come after its own first barrier.
        # With other hosts the first rank takes the host's whole sum to them.
        if across is not None:
            if self._rank == 0:
                across(stage[self._size])

            comm.barrier()
            flat.copy_(stage[self._size])

            return

        for chunk in chunks:
            self._copy_out(flat, chunk)

    def _pipelined(self, flat: Tensor, divisor: int) -> None:
        """Does the same chunk by chunk, so that copying and adding overlap between ranks.

        Two chunks' worth of memory is enough: what step k writes was read for the last time in
        step k-1, and a barrier lies between them.
        """
        length = chunk_length(flat.element_size())
        stage = self._stage(2 * length, flat.dtype)
        key = (flat.numel(), flat.dtype)
        if key not in self._chunks:
            # Even chunks use one half of the stage, odd ones the other.
            self._chunks[key] = [
                self._chunk(stage.narrow(1, number % 2 * length, stop - start), start)
                for number, (start, stop) in enumerate(segments(0, flat.numel(), length))
            ]

        chunks = self._chunks[key]

        # Two steps more than chunks: the last chunk is added one step after it was copied in, and
        # copied out one step later.
        for step in range(len(chunks) + 2):
            # What the step before has written is complete.
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
        """Makes the views for the chunk at `start` of a vector.

        `stage` is the chunk's place in the staging memory.              (ranks + 1, length)
        """
        mine = stage[self._rank]
        result = stage[self._size]

        # The own part of the chunk.
        low, high = bounds(stage.shape[1], self._size)[self._rank]

        # What lies before and behind the own part, where there is something.
        around = ((0, low), (high, stage.shape[1]))
        others = [(a, b) for a, b in around if b > a]

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
        """Puts this rank's shares of the others' parts where they can read them."""
        # At most two ranges: what lies before the own part, and what lies behind it.
        for start, stop, place in chunk.into:
            place.copy_(flat[start:stop])

    def _add(self, flat: Tensor, chunk: _Chunk, divisor: int) -> None:
        """Adds the own part of a chunk, shares in rank order, and puts it into the vector."""
        # Views: what this rank has, and where the sum goes.
        mine = flat[chunk.own[0] : chunk.own[1]]
        total = chunk.total

        # There are at least two ranks: a rank alone on its host has no `HostMemory`.
        first, second, *others = (mine if share is None else share for share in chunk.shares)
        torch.add(first, second, out=total)

        for share in others:
            total.add_(share)

        # Divided once, by the rank that has the whole sum.
        if divisor > 1:
            total.div_(divisor)

        # The other ranks get it from `total`.
        mine.copy_(total)

    def _copy_out(self, flat: Tensor, chunk: _Chunk) -> None:
        """Takes the parts that the other ranks have added."""
        for start, stop, result in chunk.out:
            flat[start:stop].copy_(result)

    # -- book-keeping and memory -------------------------------------------------------------------

    def _count(self, flat: Tensor, *, alone: bool) -> None:
        """Notes what this rank moves through shared memory for one total.

        `alone`: there is no other host.
        """
        key = (flat.numel(), flat.element_size())

        if key not in self._counts:
            mine = host_traffic(*key, self._comm.world_ranks, alone=alone, of=[self._rank])
            self._counts[key] = list(mine.shm.items())

        # By arithmetic, not by watching: the copies are plain tensor operations.
        for edge, num_bytes in self._counts[key]:
            self._comm.traffic.add_shm(*edge, num_bytes)

    def _stage(self, length: int, dtype: torch.dtype) -> Tensor:
        """Gives staging memory for vectors of `length`.                  (ranks + 1, length)"""
        key = (length, dtype)
        if key not in self._stages:
            # A row for each rank's shares, and one for the result.
            self._stages[key] = self._shared("stage", self._size + 1, length, dtype)

        return self._stages[key]

    def _shared(self, name: str, count: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Gives shared memory of shape (count, numel), every row on pages of its own."""

        # A row of less than whole pages is followed by a gap, which the view leaves out.
        page = PAGE_BYTES // dtype.itemsize  # elements
        stride = -(-numel // page) * page  # numel rounded up to whole pages

        return self._comm.shared(name, count * stride, dtype).view(count, stride)[:, :numel]


def chunk_length(itemsize: int) -> int:
    """Says how many elements a chunk has."""
    return CHUNK_BYTES // itemsize


def own_ranges(numel: int, itemsize: int, size: int, rank: int) -> list[tuple[int, int]]:
    """Lists the ranges that `rank` adds, one per chunk; empty ones are left out."""
    found = []
    for start, stop in segments(0, numel, chunk_length(itemsize)):
        # Cut chunk by chunk, not as a whole: a rank's part of a chunk fits into its cache.
        low, high = bounds(stop - start, size)[rank]
        if high > low:
            found.append((start + low, start + high))

    return found


def part_bytes(numel: int, itemsize: int, size: int) -> list[int]:
    """Says how many bytes of a vector each rank adds, by rank."""
    return [
        sum(stop - start for start, stop in own_ranges(numel, itemsize, size, rank)) * itemsize
        for rank in range(size)
    ]


def host_traffic(
    numel: int, itemsize: int, ranks: Sequence[int], *, alone: bool, of: Sequence[int] | None = None
) -> Traffic:
    """Says what one total hands over inside a host of these ranks, through shared memory.

    Part i of rank j's vector is read by rank i, and j gets the result of it: 2 (n-1) M bytes for n
    ranks. With other hosts (not `alone`) the sum is gathered at the first rank and all get it from
    there: (n-1)/n M bytes more. `of` limits the answer to what the ranks at these positions do.
    """
    traffic = Traffic()
    size = len(ranks)
    parts = part_bytes(numel, itemsize, size)  # by position

    for i in range(size) if of is None else of:
        for j in range(size if parts[i] else 0):
            # Rank i reads its part of j's vector.
            if i != j:
                traffic.add_shm(ranks[j], ranks[i], parts[i])

            # The result goes to everybody, or with other hosts to the first rank only.

            if i != j and (alone or j == 0):
                traffic.add_shm(ranks[i], ranks[j], parts[i])

        # With other hosts each rank gets the whole result from the first one.
        if i and not alone and numel:
            traffic.add_shm(ranks[0], ranks[i], numel * itemsize)

    return traffic
