"""Sums inside one host through shared memory: no vector is sent, every rank adds its part of it for all.

A vector is cut into chunks of 1 MiB and each chunk among the ranks: rank r adds the ranks' shares of part r, in rank
order, in pieces that stay in its cache. Where the vector lives in the segment (`slot`), all that happens is: barrier,
add the own part and write it to every slot, barrier. Otherwise the other ranks' parts are copied in, barrier, the own
part is added into the host's result, barrier, the other parts are copied out; from 16 MiB on chunk by chunk, so that
while chunk k is copied in, k-1 is added and k-2 copied out.
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

Across = Callable[[Tensor], None]  # what the host's first rank does with the host's sum, before everybody gets it


class _Stage(NamedTuple):
    """Where vectors of one size and type are copied to: a slot per rank, and the host's result."""

    slots: Tensor  # (ranks, length)
    result: Tensor  # (length,)


class HostMemory:
    """Of the ranks of `comm`, which share a host. All of them call the same methods in the same order."""

    def __init__(self, comm: Comm) -> None:
        self._comm, self._rank, self._size = comm, comm.rank, comm.size
        self._owned: list[Tensor] = []  # (ranks, numel) each
        self._stages: dict[tuple[int, torch.dtype], _Stage] = {}
        self._counts: dict[tuple[int, int], list[tuple[Edge, int]]] = {}  # (numel, itemsize) -> what a total counts

    def slot(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory for a vector of this rank that the others can read and write."""
        slots = self._slots("slots", self._size, numel, dtype)
        self._owned.append(slots)
        return slots[self._rank]

    def total(self, flat: Tensor, *, divisor: int, across: Across | None) -> None:
        """Replaces `flat` by the sum over the host's ranks, divided; `across` divides itself."""
        self._count(flat, alone=across is None)
        rows = self._rows_of(flat)
        if rows is not None:
            self._in_place(rows, divisor, across)
        elif across is None and flat.numel() * flat.element_size() >= PIPELINED_BYTES:
            self._pipelined(flat, divisor)
        else:
            self._staged(flat, divisor, across)

    def _rows_of(self, flat: Tensor) -> list[Tensor] | None:
        """The same range of every rank's slot, where `flat` lies in this rank's; None where it does not."""
        for slots in self._owned:
            offset = flat.data_ptr() - slots[self._rank].data_ptr()
            start, size = offset // flat.element_size(), slots.shape[1]
            if slots.dtype == flat.dtype and offset >= 0 and start + flat.numel() <= size:
                return [slot[start : start + flat.numel()] for slot in slots]
        return None

    def _in_place(self, rows: list[Tensor], divisor: int, across: Across | None) -> None:
        comm, first = self._comm, rows[0]
        comm.barrier()
        for start, stop in self._mine(first):
            total = first[start:stop]
            for row in rows[1:]:
                total.add_(row[start:stop])
            if across is None:
                total.div_(divisor)
                for row in rows[1:]:
                    row[start:stop].copy_(total)
        comm.barrier()
        if across is None:
            return
        if self._rank == 0:
            across(first)
        comm.barrier()
        if self._rank > 0:
            rows[self._rank].copy_(first)
        comm.barrier()  # nobody changes what others still copy

    def _staged(self, flat: Tensor, divisor: int, across: Across | None) -> None:
        comm, stage = self._comm, self._stage(flat.numel(), flat.dtype)
        chunks = segments(0, flat.numel(), _chunk_length(flat.element_size()))
        for start, stop in chunks:
            self._copy_in(flat[start:stop], stage.slots[:, start:stop])
        comm.barrier()
        for start, stop in chunks:
            result = stage.result[start:stop]
            self._add(flat[start:stop], stage.slots[:, start:stop], result, divisor if across is None else 1)
        comm.barrier()
        if across is not None:
            if self._rank == 0:
                across(stage.result)
            comm.barrier()
            flat.copy_(stage.result)
            return
        for start, stop in chunks:
            self._copy_out(flat[start:stop], stage.result[start:stop])

    def _pipelined(self, flat: Tensor, divisor: int) -> None:
        """Two chunks' worth of memory: what step k writes was read for the last time in step k-1."""
        length = _chunk_length(flat.element_size())
        halves = self._stage(2 * length, flat.dtype)
        chunks = [flat[start:stop] for start, stop in segments(0, flat.numel(), length)]
        for step in range(len(chunks) + 2):
            if step:
                self._comm.barrier()
            if step < len(chunks):
                self._copy_in(chunks[step], _half(halves.slots, step, length))
            if 1 <= step <= len(chunks):
                slots, result = (_half(whole, step - 1, length) for whole in halves)
                self._add(chunks[step - 1], slots, result, divisor)
            if step >= 2:
                self._copy_out(chunks[step - 2], _half(halves.result, step - 2, length))

    # -- one chunk -----------------------------------------------------------------------------------------------

    def _copy_in(self, chunk: Tensor, slots: Tensor) -> None:
        for start, stop in self._others(chunk.numel()):
            slots[self._rank, start:stop].copy_(chunk[start:stop])

    def _add(self, chunk: Tensor, slots: Tensor, result: Tensor, divisor: int) -> None:
        """The own part: the own share straight from the vector, the others' from their slots, in rank order."""
        start, stop = bounds(chunk.numel(), self._size)[self._rank]
        mine, total = chunk[start:stop], result[start:stop]
        rows = [mine if rank == self._rank else slots[rank, start:stop] for rank in range(self._size)]
        torch.add(rows[0], rows[1], out=total)
        for row in rows[2:]:
            total.add_(row)
        if divisor > 1:
            total.div_(divisor)
        mine.copy_(total)

    def _copy_out(self, chunk: Tensor, result: Tensor) -> None:
        for start, stop in self._others(chunk.numel()):
            chunk[start:stop].copy_(result[start:stop])

    def _others(self, numel: int) -> list[tuple[int, int]]:
        """What lies before and behind the own part."""
        start, stop = bounds(numel, self._size)[self._rank]
        return [(a, b) for a, b in ((0, start), (stop, numel)) if b > a]

    def _mine(self, flat: Tensor) -> list[tuple[int, int]]:
        """The own part of each chunk."""
        return own_ranges(flat.numel(), flat.element_size(), self._size, self._rank)

    def _count(self, flat: Tensor, *, alone: bool) -> None:
        key = (flat.numel(), flat.element_size())
        if key not in self._counts:
            mine = host_traffic(*key, self._comm.world_ranks, alone=alone, of=[self._rank])
            self._counts[key] = list(mine.shm.items())
        for edge, num_bytes in self._counts[key]:
            self._comm.traffic.add_shm(*edge, num_bytes)

    # -- memory --------------------------------------------------------------------------------------------------

    def _stage(self, length: int, dtype: torch.dtype) -> _Stage:
        key = (length, dtype)
        if key not in self._stages:
            whole = self._slots("stage", self._size + 1, length, dtype)
            self._stages[key] = _Stage(whole[: self._size], whole[self._size])
        return self._stages[key]

    def _slots(self, name: str, count: int, numel: int, dtype: torch.dtype) -> Tensor:
        """(count, numel), every row on pages of its own."""
        page = PAGE_BYTES // dtype.itemsize
        stride = -(-numel // page) * page
        return self._comm.shared(name, count * stride, dtype).view(count, stride)[:, :numel]


def _half(whole: Tensor, number: int, length: int) -> Tensor:
    """Chunk `number`'s half of the last dimension."""
    return whole.narrow(-1, number % 2 * length, length)


def _chunk_length(itemsize: int) -> int:
    return CHUNK_BYTES // itemsize


def own_ranges(numel: int, itemsize: int, size: int, rank: int) -> list[tuple[int, int]]:
    """Part `rank` of every chunk; empty ones are left out."""
    found = []
    for start, stop in segments(0, numel, _chunk_length(itemsize)):
        low, high = bounds(stop - start, size)[rank]
        if high > low:
            found.append((start + low, start + high))
    return found


def part_bytes(numel: int, itemsize: int, size: int) -> list[int]:
    """Bytes of each rank's part."""
    return [
        sum(stop - start for start, stop in own_ranges(numel, itemsize, size, rank)) * itemsize for rank in range(size)
    ]


def host_traffic(
    numel: int, itemsize: int, ranks: Sequence[int], *, alone: bool, of: Sequence[int] | None = None
) -> Traffic:
    """What one total hands over inside a host of these ranks. `alone`: there is no other host.

    Part i of rank j's vector is read by i, and j gets the result of it: 2 (n-1) M for n ranks. With other hosts the sum
    is gathered at the first rank, and all get it from there: (n-1)/n M more. `of`: what only these positions do.
    """
    traffic, size = Traffic(), len(ranks)
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
