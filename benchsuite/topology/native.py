"""The backend's own all-reduce (gloo: a segmented ring; NCCL: its choice).

Sends 2 (N-1)/N * M bytes per rank and step; on NCCL the figure is nominal, because the library
chooses the algorithm. Calls of the library are not counted but derived: their number and sizes are
seen by a dispatch mode, and multiplied by the ring's factor (Patarasuk and Yuan 2009).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite import topology
from benchsuite.comm import Comm, Traffic
from benchsuite.topology import ring_traffic


@dataclass
class Topology(topology.Topology):
    """Vectors are reduced by one call of the backend.

    It is the yardstick for the topologies that are written out in this folder.
    """

    payload_source = "derived"
    timing_free = True
    gathers = True
    kind = "collective"
    label = "native all-reduce"
    short_label = "native"
    order = 0
    num_workers = 0
    num_servers = 0

    def start(self, comm: Comm, *, num_servers: int = 0) -> None:
        assert num_servers == 0, "rules: servers need parameter_server"
        # Nothing is kept beside: the library has its own buffers.
        self._comm = comm
        self.num_workers = comm.size

    def mean(self, flat: Tensor) -> None:
        self.total(flat, divisor=self.num_workers)

    def total(self, flat: Tensor, *, divisor: int) -> None:
        """Replaces `flat` (P,) by its sum over the workers, divided by `divisor` once."""
        # A single worker has nobody to call the library with.
        if self.num_workers > 1:
            self._comm.all_reduce(flat)

        # The backend's own average is not used: gloo has none.
        if divisor > 1:
            flat.div_(divisor)

    def gather(self, wire: Tensor) -> list[Tensor]:
        """Returns every worker's vector, in rank order.                  N views of (B,)"""
        out = torch.empty(self.num_workers * wire.numel(), dtype=wire.dtype, device=wire.device)
        self._comm.all_gather(out, wire)

        # (N, B): one row per worker
        return list(out.view(self.num_workers, -1))

    # -- predictions -------------------------------------------------------------------------------

    def predicted_gather(self, num_bytes: int, *, num_workers: int) -> Traffic:
        """Predicts one all-gather of the backend: (N-1) vectors leave each rank, as around a ring.

        Each of them has `num_bytes` bytes.
        """
        traffic = Traffic()

        # A rank passes on every vector but the one that its right neighbour gave.
        for rank in range(num_workers if num_workers > 1 and num_bytes else 0):
            right = (rank + 1) % num_workers
            passed_on = num_workers - 1
            traffic.add(rank, right, passed_on * num_bytes, passed_on)

        return traffic

    def predicted_traffic(
        self, numel: int, itemsize: int, *, num_workers: int, num_servers: int = 0
    ) -> Traffic:
        # `longest` is the whole vector: how the library cuts it into messages is its own affair,
        # and messages inside of it are not counted.
        return ring_traffic(numel, itemsize, num_workers, longest=max(numel, 1))
