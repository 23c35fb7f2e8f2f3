"""Gossip graph: a ring, everybody mixes with both neighbours in every step (Lian et al. 2017,
D-PSGD).

The mixing matrix has W_ij = 1/3 for rank i itself and for its two neighbours. Two workers mix half
and half, and one worker mixes with nobody. W is symmetric, so it is doubly stochastic.

Sends 2 M bytes per rank and step in 2 messages; for N = 2 it is M bytes in 1 message.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchsuite import topology
from benchsuite.comm import Comm


@dataclass
class Topology(topology.Graph):
    """Every rank mixes with its left and right neighbour, the same in every step.

    What one rank knows takes N/2 steps to the rank across.
    """

    timing_free = True
    kind = "graph"
    called = "a gossip graph"
    short_label = "ring"
    order = 7
    num_workers = 0
    num_servers = 0

    def start(self, comm: Comm, *, num_servers: int = 0) -> None:
        assert num_servers == 0, "rules: servers need parameter_server"
        self._rank = comm.rank
        self.num_workers = comm.size

    def neighbours(self, step: int) -> list[tuple[int, float]]:
        beside = _beside(self._rank, self.num_workers)

        # Equal weights for the neighbours and for the rank itself.
        return [(rank, 1 / (len(beside) + 1)) for rank in beside]

    def listeners(self, step: int) -> list[int]:
        return _beside(self._rank, self.num_workers)

    # -- predictions -------------------------------------------------------------------------------

    def edges(self, step: int, num_workers: int) -> list[tuple[int, int]]:
        return [
            (source, rank) for rank in range(num_workers) for source in _beside(rank, num_workers)
        ]


def _beside(rank: int, size: int) -> list[int]:
    """Lists the neighbours of a rank in rank order.

    Both are the same rank where there are two, and the rank itself where there is one: the set
    keeps each of them once, and never the rank itself.
    """
    return sorted({(rank - 1) % size, (rank + 1) % size} - {rank})
