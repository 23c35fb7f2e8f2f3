"""A star: rank 0 adds up everybody's vector, divides once and sends the mean back."""

from dataclasses import dataclass

import torch

from benchsuite import topology
from benchsuite.comm import Traffic


@dataclass
class Topology(topology.Topology):
    """One rank in the middle."""

    largest: int = 8
    """The most workers that the rank in the middle serves."""

    label = "My star"
    kind = "collective"
    timing_free = True
    refuses = (
        {
            "rule": "size of a star",
            "when": "cell.replicas > largest",
            "reason": "{cell.replicas} workers around one rank: {name} serves {largest}",
            "remedy": "set replicas = {largest}, or topology = ring",
        },
    )

    def start(self, comm, *, num_servers=0):
        self.comm = comm
        self.num_workers = comm.size

    def mean(self, flat):
        others = range(1, self.num_workers)
        if self.comm.rank > 0:
            self.comm.send(flat, 0)
            self.comm.recv(flat, 0)
            return
        one = torch.empty_like(flat)
        for other in others:
            self.comm.recv(one, other)
            flat.add_(one)
        flat.div_(self.num_workers)
        for other in others:
            self.comm.send(flat, other)

    def predicted_traffic(self, numel, itemsize, *, num_workers, num_servers=0):
        traffic = Traffic()
        for other in range(1, num_workers):
            traffic.add(other, 0, numel * itemsize)
            traffic.add(0, other, numel * itemsize)
        return traffic
