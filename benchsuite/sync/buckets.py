"""Buckets: parts of the gradient set out while the backward pass still works on the others.

Li et al. 2020 (PyTorch Distributed), section 3.2.
The flat gradient is cut from its end, where a backward pass begins, at borders of tensors: a first
bucket of at most 1 MiB, so that something travels early, then `bucket_mib` each. A bucket sets out
on the second lane when it is whole and all before it have set out: the same order on every rank,
which a collective needs.
"""

from __future__ import annotations

from benchsuite.comm import Comm, Handle, Traffic
from benchsuite.topology import Topology, lend_memory
from benchsuite.workload import Part, Shapes, numel

MIB = 2**20
FIRST_BYTES = 1 * MIB


def bucket_ranges(shapes: Shapes, itemsize: int, bucket_mib: float) -> list[tuple[int, int]]:
    """(start, stop) of each bucket of the flat vector, in the order in which they set out. A tensor
    is never cut.
    """
    ranges = []
    stop = numel(shapes)
    start = stop
    limit = min(FIRST_BYTES, bucket_mib * MIB)

    for shape in reversed(list(shapes.values())):
        if start < stop and (stop - start + shape.numel()) * itemsize > limit:
            ranges.append((start, stop))
            stop = start
            limit = bucket_mib * MIB

        start -= shape.numel()

    return [*ranges, (start, stop)] if start < stop else ranges


class Buckets:
    """Of one rank. `ready` is for `Part.gradient`; `wait` ends the step."""

    def __init__(self, comm: Comm, part: Part, topology: Topology, bucket_mib: float) -> None:
        self._comm = comm
        self._part = part
        self._topology = topology.second()
        self._ranges = bucket_ranges(part.shapes, part.params.element_size(), bucket_mib)
        comm.lane(self._open).wait()
        self._begin()

    def _open(self, lane: Comm) -> None:
        """On the lane: its own topology, whose memory the gradient lives in where it has some."""
        self._topology.start(lane)
        lend_memory(self._topology, self._part)

    def _begin(self) -> None:
        self._missing = [stop - start for start, stop in self._ranges]
        self._next = 0
        self._under_way: list[Handle] = []

    def ready(self, start: int, stop: int) -> None:
        """This slice of the gradient is final."""
        for number in range(self._next, len(self._ranges)):
            low, high = self._ranges[number]
            self._missing[number] -= max(0, min(stop, high) - max(start, low))

        while self._next < len(self._ranges) and self._missing[self._next] == 0:
            self._under_way.append(self._comm.lane(self._mean, self._next))
            self._next += 1

    def _mean(self, lane: Comm, number: int) -> None:
        start, stop = self._ranges[number]
        self._topology.mean(self._part.grad[start:stop])

    def wait(self) -> None:
        """Until the means of all buckets are in."""
        under_way = self._under_way
        self._begin()

        for handle in under_way:
            handle.wait()


def buckets_traffic(
    topology: Topology, shapes: Shapes, itemsize: int, bucket_mib: float, *, num_workers: int
) -> Traffic:
    """Traffic of one step."""
    return Traffic.total(
        topology.predicted_traffic(stop - start, itemsize, num_workers=num_workers)
        for start, stop in bucket_ranges(shapes, itemsize, bucket_mib)
    )
