"""Buckets: parts of the gradient set out while the backward pass still works on the others.

Li et al. 2020 (PyTorch Distributed), section 3.2. The flat gradient is cut from its end, where a
backward pass begins, at borders of tensors: a first bucket of at most 1 MiB, so that something
travels early, then buckets of `bucket_mib`. A bucket sets out on the second lane when it is whole
and all before it have set out. That is the same order on every rank, which a collective needs.

Sends what one mean of M bytes costs on its topology, in as many pieces as there are buckets.
"""

from __future__ import annotations

from benchsuite.comm import Comm, Handle, Traffic
from benchsuite.topology import Topology, lend_memory
from benchsuite.workload import Part, Shapes, numel

MIB = 2**20
FIRST_BYTES = 1 * MIB  # at most, of the first bucket


def bucket_ranges(shapes: Shapes, itemsize: int, bucket_mib: float) -> list[tuple[int, int]]:
    """Lists the range (start, stop) of each bucket of the flat vector, in order of setting out.

    A tensor is never cut: one that is larger than a bucket is a bucket of its own.
    """
    ranges = []

    # The open bucket is start .. stop; it grows downwards, tensor by tensor.
    stop = numel(shapes)
    start = stop
    limit = min(FIRST_BYTES, bucket_mib * MIB)

    for shape in reversed(list(shapes.values())):
        # The tensor would make it too large: close it, unless it is empty.
        if start < stop and (stop - start + shape.numel()) * itemsize > limit:
            ranges.append((start, stop))
            stop = start
            limit = bucket_mib * MIB

        start -= shape.numel()

    return [*ranges, (start, stop)] if start < stop else ranges


class Buckets:
    """The buckets of one rank.

    `Part.gradient` calls `ready` while the backward pass goes on, and `wait` ends the step. The
    means are made on the second lane of communication, one after the other.
    """

    def __init__(self, comm: Comm, part: Part, topology: Topology, bucket_mib: float) -> None:
        self._comm = comm
        self._part = part
        self._topology = topology.second()  # the lane's own
        self._ranges = bucket_ranges(part.shapes, part.params.element_size(), bucket_mib)

        # Waited for: groups are created by all ranks together, and the first backward pass needs
        # the gradient where it will stay.
        comm.lane(self._open).wait()
        self._begin()

    def _open(self, lane: Comm) -> None:
        """Starts, on the lane, its own topology, and puts the gradient into its memory."""
        self._topology.start(lane)
        lend_memory(self._topology, self._part)

    def _begin(self) -> None:
        """Begins a step: nothing of any bucket is there, none has set out."""
        self._missing = [stop - start for start, stop in self._ranges]
        self._next = 0
        self._under_way: list[Handle] = []

    def ready(self, start: int, stop: int) -> None:
        """Notes that this slice of the gradient is final, and sends out what has become whole.

        Slices come in the order of the backward pass, which need not be that of the buckets; a
        bucket that is whole too early waits for those before it.
        """
        for number in range(self._next, len(self._ranges)):
            low, high = self._ranges[number]
            # What the slice and the bucket have in common; 0 where they do not touch.
            self._missing[number] -= max(0, min(stop, high) - max(start, low))

        # In order: the means of a collective must be begun in the same order on every rank.
        while self._next < len(self._ranges) and self._missing[self._next] == 0:
            self._under_way.append(self._comm.lane(self._mean, self._next))
            self._next += 1

    def _mean(self, lane: Comm, number: int) -> None:
        """Replaces, on the lane, a bucket of the gradient by its mean over the workers."""
        start, stop = self._ranges[number]
        self._topology.mean(self._part.grad[start:stop])

    def wait(self) -> None:
        """Waits until the means of all buckets are in, and begins the next step."""
        # First a clean start: a handle that raises must not leave the old step behind.
        under_way = self._under_way
        self._begin()

        for handle in under_way:
            handle.wait()


def buckets_traffic(
    topology: Topology, shapes: Shapes, itemsize: int, bucket_mib: float, *, num_workers: int
) -> Traffic:
    """Predicts the traffic of one step: one mean per bucket."""
    return Traffic.total(
        topology.predicted_traffic(stop - start, itemsize, num_workers=num_workers)
        for start, stop in bucket_ranges(shapes, itemsize, bucket_mib)
    )
