"""Ring all-reduce: the decentralised synchronisation of the article's section 3.3.2 (Patarasuk and
Yuan 2009).

The vector is cut into N chunks. In round k of the N-1 rounds of reduce-scatter, rank i sends its
partial sum of chunk i-k to the right, and adds its own part to chunk i-k-1, which comes from the
left. Then it has the whole sum of chunk i+1 and divides it once. N-1 rounds of all-gather pass the
finished chunks on. Every rank ends with the same bits.

Sends 2 (N-1)/N * M bytes per rank and step in 2 (N-1) messages, in more where a chunk is cut into
segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite import topology
from benchsuite.comm import Comm, Handle, Traffic
from benchsuite.topology import bounds, ring_traffic, segments


@dataclass
class Topology(topology.Topology):
    """Chunks travel around a ring of point-to-point messages, in two phases.

    Every port is busy all the time, which is why large vectors are fast; the number of rounds
    grows with N, which is why small ones are slow.
    """

    segment_kib: int = 2048
    """Longest message in KiB; a chunk is cut into such segments so that adding overlaps
    receiving.
    """

    timing_free = True
    kind = "collective"
    order = 1
    all_to_all = True
    at_least = {"segment_kib": 1}
    num_workers = 0
    num_servers = 0

    def start(self, comm: Comm, *, num_servers: int = 0) -> None:
        assert num_servers == 0, "rules: servers need parameter_server"
        self._comm = comm
        self.num_workers = comm.size
        # By (address, numel, dtype): a step reduces the same vectors again.
        self._plans: dict[tuple[int, int, torch.dtype], _Plan] = {}

    def mean(self, flat: Tensor) -> None:
        self.total(flat, divisor=self.num_workers)

    def total(self, flat: Tensor, *, divisor: int) -> None:
        """Replaces `flat` (P,) by its sum over the workers, divided by `divisor`.

        The rank that is the first to have a chunk's whole sum divides it, once, and the others
        get the quotient: all have the same bits.
        """
        # `hierarchical` divides by the workers of all hosts, also where this ring has one rank.
        if self.num_workers == 1:
            if divisor > 1:
                flat.div_(divisor)

            return

        # The plan has views of the vector, so the address belongs to the key.
        key = (flat.data_ptr(), flat.numel(), flat.dtype)
        if key not in self._plans:
            self._plans[key] = _Plan(flat, self._comm, self._longest(flat.element_size()))

        # A backend that cannot post ahead needs sends and receives in matching rounds.
        if self._comm.posts_ahead:
            self._total_ahead(self._plans[key], divisor)
        else:
            self._total_in_rounds(self._plans[key], divisor)

    def predicted_traffic(
        self, numel: int, itemsize: int, *, num_workers: int, num_servers: int = 0
    ) -> Traffic:
        return ring_traffic(numel, itemsize, num_workers, longest=self._longest(itemsize))

    def _longest(self, itemsize: int) -> int:
        """Says how many elements a segment has at most."""
        return max(1, self.segment_kib * 1024 // itemsize)

    def _total_ahead(self, plan: _Plan, divisor: int) -> None:
        """Posts every receive of both phases at once, so a segment is taken the moment it comes.

        The own chunk is sent before the receives are posted. It leaves meanwhile, and the notices
        of the receives do not hold the connection up: 3.7 -> 3.2 ms for 4 MiB between 2 ranks, 2.2
        -> 0.9 ms for 1 MiB.

        The receives of the all-gather point into the vector itself, which looks like a race with
        the adding. It is none: a final chunk arrives only after our partial sum of it was sent,
        that is, after our own part of it was read.
        """
        comm = self._comm
        right = (self._comm.rank + 1) % self.num_workers
        left = (self._comm.rank - 1) % self.num_workers

        sending: list[Handle] = [comm.isend(piece, right) for piece in plan.own]

        # One handle per segment, by round: partial sums into scratch, final chunks into place.
        arriving = [[comm.irecv(piece, left) for piece in pieces] for pieces in plan.scratch]
        finished = [[comm.irecv(piece, left) for piece in pieces] for pieces in plan.final]
        last = len(plan.scratch) - 1

        # Reduce-scatter: add our own part to what has come, and pass it on.
        for round_, (handles, pieces) in enumerate(zip(arriving, plan.scratch, strict=True)):
            for handle, partial, mine in zip(handles, pieces, plan.mine[round_], strict=True):
                handle.wait()
                if round_ == last:
                    # The chunk is whole and ours: its send is the first of the all-gather.
                    mine.add_(partial).div_(divisor)
                    sending.append(comm.isend(mine, right))
                else:
                    sending.append(comm.isend(partial.add_(mine), right))

        # All-gather: pass final chunks on, but not the last, which the right neighbour owns.
        for round_, (handles, pieces) in enumerate(zip(finished, plan.final, strict=True)):
            for handle, piece in zip(handles, pieces, strict=True):
                handle.wait()
                if round_ < last:
                    sending.append(comm.isend(piece, right))

        # The vector is the caller's again only when nothing is read from it any more.
        for send in sending:
            send.wait()

    def _total_in_rounds(self, plan: _Plan, divisor: int) -> None:
        """Goes round by round as the textbook does, with one `sendrecv` per segment.

        NCCL runs the operations of a pair in posting order, so nothing can be posted ahead.
        """
        right = (self._comm.rank + 1) % self.num_workers
        left = (self._comm.rank - 1) % self.num_workers
        last = len(plan.scratch) - 1

        # Reduce-scatter: the partial sum that has just come is what goes out next.
        outgoing = plan.own

        for round_, pieces in enumerate(plan.scratch):
            self._exchange(outgoing, right, pieces, left)

            for partial, mine in zip(pieces, plan.mine[round_], strict=True):
                if round_ == last:
                    mine.add_(partial).div_(divisor)
                else:
                    partial.add_(mine)

            # Partial sums live in scratch; the last one is whole, and in the vector itself.
            outgoing = plan.mine[round_] if round_ == last else pieces

        # All-gather: what has just come is what goes out next, in place.
        for pieces in plan.final:
            self._exchange(outgoing, right, pieces, left)
            outgoing = pieces

    def _exchange(
        self, outgoing: list[Tensor], right: int, incoming: list[Tensor], left: int
    ) -> None:
        """Sends one chunk to the right while another comes from the left.

        The two chunks of a round may differ by one element, and so by one segment: the one too
        many has no partner and goes alone.
        """
        for position in range(max(len(outgoing), len(incoming))):
            # Only one of the two can be over: both chunks of a round are of nearly one size.
            if position >= len(outgoing):
                self._comm.recv(incoming[position], left)
            elif position >= len(incoming):
                self._comm.send(outgoing[position], right)
            else:
                self._comm.sendrecv(outgoing[position], right, incoming[position], left)


class _Plan:
    """The views of one vector and the scratch memory for it, built at its first reduction.

    `own` is the chunk that this rank sends first. By round there are `mine`, the own part that is
    added to what comes, `scratch`, where that comes to, and `final`, where finished chunks go.
    Each chunk is a list of segments of at most `longest` elements.
    """

    def __init__(self, flat: Tensor, comm: Comm, longest: int) -> None:
        size = comm.size
        rank = comm.rank
        ranges = bounds(flat.numel(), size)

        def cut(chunk: int) -> list[Tensor]:
            """Cuts a chunk into segments; chunk numbers go around the ring."""
            start, stop = ranges[chunk % size]
            return [flat[a:b] for a, b in segments(start, stop, longest)]

        # The chunk that has this rank's number goes out first, as it is.
        self.own = cut(rank)

        # In round k chunk i-k-1 comes by the reduce-scatter, and chunk i-k by the all-gather.
        self.mine = [cut(rank - round_ - 1) for round_ in range(size - 1)]
        self.final = [cut(rank - round_) for round_ in range(size - 1)]

        # As large as `mine`, segment by segment: nobody else writes there.
        self.scratch = [[torch.empty_like(piece) for piece in pieces] for pieces in self.mine]
