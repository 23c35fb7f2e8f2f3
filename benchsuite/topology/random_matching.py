"""Gossip graph: a random perfect matching, drawn anew in every step (Boyd et al. 2006, randomised
gossip; N even).

The two ranks of a pair mix half and half: W_ij = W_ji = 1/2, so W is doubly stochastic in every
step. All ranks draw the same pairs without a message, from the option `seed` and the number of the
step.

Sends M bytes per rank and step, in 1 message.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchsuite import topology
from benchsuite.comm import Comm


@dataclass
class Topology(topology.Graph):
    """Ranks meet in pairs that are drawn anew in every step.

    Over many steps everybody meets everybody, although each step sends one message per rank.
    """

    seed: int = 0
    """Of the pairs, the same on all ranks; with the step's number it decides who meets whom."""

    timing_free = True
    kind = "graph"
    called = "a gossip graph"
    short_label = "matching"
    order = 9
    refuses = (
        {
            "rule": "random matching",
            "when": "cell.replicas % 2 != 0",
            "reason": "replicas = {cell.replicas} is odd: in a matching every worker has a partner",
            "remedy": "set an even number of replicas, or topology = ring_neighbours",
        },
        {
            "rule": "random matching",
            "when": "seed < 0",
            "reason": "seed = {seed:g} of {name}: 0 or more is needed",
            "remedy": "set seed = 0",
        },
    )
    num_workers = 0
    num_servers = 0

    def start(self, comm: Comm, *, num_servers: int = 0) -> None:
        assert num_servers == 0, "rules: servers need parameter_server"
        assert comm.size % 2 == 0, "rules: random_matching needs N even"
        self._rank = comm.rank
        self.num_workers = comm.size
        # The newest step that was drawn, and the partner of each rank in it: a step asks twice.
        self._drawn: tuple[int, list[int]] = (-1, [])

    def neighbours(self, step: int) -> list[tuple[int, float]]:
        return [(self._partner(step), 0.5)]

    def listeners(self, step: int) -> list[int]:
        return [self._partner(step)]

    def edges(self, step: int, num_workers: int) -> list[tuple[int, int]]:
        return [(source, rank) for rank, source in enumerate(self._partners(step, num_workers))]

    def _partner(self, step: int) -> int:
        """Gives this rank's partner in a step."""
        if self._drawn[0] != step:
            self._drawn = (step, self._partners(step, self.num_workers))

        return self._drawn[1][self._rank]

    def _partners(self, step: int, num_workers: int) -> list[int]:
        """Draws the partner of each rank in a step."""
        # A generator of its own per step: any step can be drawn without those before it.
        generator = np.random.default_rng([self.seed, step])

        # Neighbours in a random order are a random matching.               (N/2, 2)
        pairs = generator.permutation(num_workers).reshape(-1, 2)
        left = pairs[:, 0]
        right = pairs[:, 1]

        partners = np.empty(num_workers, dtype=np.int64)
        partners[left] = right
        partners[right] = left

        return [int(rank) for rank in partners]
