"""Gossip graph: one-peer exponential (Ying et al. 2021, "Exponential graph is provably efficient",
section 4).

q = ceil(log2 N); in step k rank i gets from i + 2^(k mod q) with weight 1/2, and sends to i - 2^(k
mod q). W is doubly stochastic for every N; for N = 2^q the product of q steps is 1/N everywhere:
consensus after q steps. Sends M bytes per rank and step, 1 message.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchsuite import topology
from benchsuite.comm import Comm


@dataclass
class Topology(topology.Graph):
    """One peer per step, its distance doubles from step to step."""

    timing_free = True
    kind = "graph"
    called = "a gossip graph"
    order = 8
    num_workers = 0
    num_servers = 0

    def start(self, comm: Comm, *, num_servers: int = 0) -> None:
        assert num_servers == 0, "rules: servers need parameter_server"
        self._rank = comm.rank
        self.num_workers = comm.size

    def neighbours(self, step: int) -> list[tuple[int, float]]:
        if self.num_workers == 1:
            return []

        return [((self._rank + distance(step, self.num_workers)) % self.num_workers, 0.5)]

    def listeners(self, step: int) -> list[int]:
        if self.num_workers == 1:
            return []

        return [(self._rank - distance(step, self.num_workers)) % self.num_workers]

    def edges(self, step: int, num_workers: int) -> list[tuple[int, int]]:
        if num_workers == 1:
            return []

        apart = distance(step, num_workers)
        return [((rank + apart) % num_workers, rank) for rank in range(num_workers)]


def distance(step: int, num_workers: int) -> int:
    """2^(step mod q), q = ceil(log2 N): below N, so nobody is its own peer."""
    rounds = (num_workers - 1).bit_length()
    return 1 << (step % rounds)
