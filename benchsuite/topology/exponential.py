"""Gossip graph: one-peer exponential (Ying et al. 2021, "Exponential graph is provably efficient",
section 4).

With q = ceil(log2 N), rank i in step k gets the parameters of rank i + 2^(k mod q) with weight
1/2, and sends its own to rank i - 2^(k mod q), both modulo N. The mixing matrix W is doubly
stochastic for every N. For N = 2^q the product of q steps in a row is 1/N everywhere, so replicas
would agree exactly after q steps without gradients.

Sends M bytes per rank and step, in 1 message.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchsuite import topology
from benchsuite.comm import Comm


@dataclass
class Topology(topology.Graph):
    """Every rank has one peer per step, whose distance doubles from step to step.

    What one rank knows has reached all of them after q steps.
    """

    timing_free = True
    kind = "graph"
    called = "a gossip graph"
    order = 8
    num_workers = 0
    num_servers = 0

    def start(self, comm: Comm, *, num_servers: int = 0) -> None:
        assert num_servers == 0, "rules: servers need parameter_server"
        # No message is needed to know the graph: a rank and a step determine it.
        self._rank = comm.rank
        self.num_workers = comm.size

    def neighbours(self, step: int) -> list[tuple[int, float]]:
        # A single worker has no peer.
        if self.num_workers == 1:
            return []

        peer = (self._rank + distance(step, self.num_workers)) % self.num_workers
        return [(peer, 0.5)]  # W_ii is the other half

    def listeners(self, step: int) -> list[int]:
        if self.num_workers == 1:
            return []

        return [(self._rank - distance(step, self.num_workers)) % self.num_workers]

    # -- predictions -------------------------------------------------------------------------------

    def edges(self, step: int, num_workers: int) -> list[tuple[int, int]]:
        if num_workers == 1:
            return []

        apart = distance(step, num_workers)

        # (source, destination): a rank hears the one that is `apart` to its right
        return [((rank + apart) % num_workers, rank) for rank in range(num_workers)]


def distance(step: int, num_workers: int) -> int:
    """Says how far the peer of a step is: 2^(step mod q) with q = ceil(log2 N).

    It is always below N, so nobody is its own peer. Needs at least two workers.
    """
    rounds = (num_workers - 1).bit_length()  # q

    return 1 << (step % rounds)
