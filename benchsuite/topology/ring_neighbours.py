"""Gossip graph: a ring, everybody mixes with both neighbours in every step (Lian et al. 2017,
D-PSGD).

W_ij = 1/3 for i and its two neighbours; two workers mix half and half; one mixes with nobody. W is
symmetric. Sends 2 M bytes per rank and step, 2 messages (1 of each for N = 2).
"""

from __future__ import annotations

from dataclasses import dataclass

from benchsuite import topology
from benchsuite.comm import Comm


@dataclass
class Topology(topology.Graph):
    """Left and right neighbour, in every step the same."""

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
        return [(rank, 1 / (len(beside) + 1)) for rank in beside]

    def listeners(self, step: int) -> list[int]:
        return _beside(self._rank, self.num_workers)

    def edges(self, step: int, num_workers: int) -> list[tuple[int, int]]:
        return [
            (source, rank) for rank in range(num_workers) for source in _beside(rank, num_workers)
        ]


def _beside(rank: int, size: int) -> list[int]:
    return sorted({(rank - 1) % size, (rank + 1) % size} - {rank})
