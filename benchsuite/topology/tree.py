"""Binomial tree: reduce to rank 0, then broadcast from it (Thakur, Rabenseifner and Gropp 2005,
sections 3 and 4).

In round k of the reduce every rank whose lowest set bit is bit k sends its partial sum to the rank
without that bit, and is done; rank 0 has the whole sum after ceil(log2 N) rounds and divides it
once. The broadcast takes the same edges backwards, the longest first.

Sends M bytes up, from every rank but rank 0, and M bytes down to each child. Rank 0 sends most:
ceil(log2 N) messages of M bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite import topology
from benchsuite.comm import Comm, Traffic


@dataclass
class Topology(topology.Topology):
    """Whole vectors travel up and down a binomial tree.

    The rounds are few, but vectors are not cut, so that large ones take long.
    """

    timing_free = True
    kind = "collective"
    order = 3
    num_workers = 0
    num_servers = 0

    def start(self, comm: Comm, *, num_servers: int = 0) -> None:
        assert num_servers == 0, "rules: servers need parameter_server"
        self._comm = comm
        self.num_workers = comm.size

        # A child's vector, by (numel, dtype): kept, because a step asks for the same size again.
        self._scratch: dict[tuple[int, torch.dtype], Tensor] = {}

    def mean(self, flat: Tensor) -> None:
        """Replaces `flat` (P,) by the mean over the workers."""
        comm = self._comm
        # A single worker's vector is its own mean.
        if self.num_workers == 1:
            return

        # Where this rank stands in the tree.
        below = children(comm.rank, self.num_workers)
        above = parent(comm.rank)

        # Reduce: the nearest child first, whose subtree is the smallest and so ready first. The
        # order is fixed, so that the bits repeat.
        if below:
            partial = self._scratch_for(flat)
            for child in below:
                comm.recv(partial, child)
                flat.add_(partial)

        # Rank 0 divides; everybody else gives its partial sum up and gets the mean back.
        if above is None:
            flat.div_(self.num_workers)
        else:
            comm.send(flat, above)
            comm.recv(flat, above)

        # Broadcast: the farthest child first, whose subtree has the longest way to go.
        for child in reversed(below):
            comm.send(flat, child)

    def _scratch_for(self, flat: Tensor) -> Tensor:
        """Gives memory for a child's vector as large as `flat`, kept from call to call."""
        key = (flat.numel(), flat.dtype)
        if key not in self._scratch:
            self._scratch[key] = torch.empty_like(flat)

        return self._scratch[key]

    # -- predictions -------------------------------------------------------------------------------

    def predicted_traffic(
        self, numel: int, itemsize: int, *, num_workers: int, num_servers: int = 0
    ) -> Traffic:
        traffic = Traffic()

        # One vector up and one down on each of the N-1 edges; an empty vector is sent nowhere.
        for rank in range(1, num_workers if numel else 1):
            above = parent(rank)
            assert above is not None  # only rank 0 has nobody above it

            traffic.add(rank, above, numel * itemsize)
            traffic.add(above, rank, numel * itemsize)

        return traffic


def parent(rank: int) -> int | None:
    """Gives the rank without its lowest set bit; None for rank 0, the root."""
    return rank & (rank - 1) if rank else None


def children(rank: int, size: int) -> list[int]:
    """Lists the ranks that have one bit more than this one, below its lowest set bit.

    The nearest, whose subtree is the smallest, comes first.
    """
    found = []

    # Bits below the lowest set one of the rank; rank 0 has none set, so all bits count.
    bit = 1

    while bit < size and not rank & bit:
        # The tree is not full where N is no power of two.
        if rank + bit < size:
            found.append(rank + bit)

        bit <<= 1

    return found
