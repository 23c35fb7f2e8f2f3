"""The backend's own all-reduce (gloo: a segmented ring; NCCL: its choice).

Sends 2 (N-1)/N * M bytes per rank (nominal on NCCL). Library collectives are not counted but
derived: calls and sizes seen by a dispatch mode, times the ring's factor (Patarasuk and Yuan 2009).
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
    """all_reduce of the backend."""

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
        self._comm = comm
        self.num_workers = comm.size

    def mean(self, flat: Tensor) -> None:
        self.total(flat, divisor=self.num_workers)

    def total(self, flat: Tensor, *, divisor: int) -> None:
        """Replaces `flat` by its sum over the workers, divided once."""
        if self.num_workers > 1:
            self._comm.all_reduce(flat)

        if divisor > 1:
            flat.div_(divisor)

    def gather(self, wire: Tensor) -> list[Tensor]:
        out = torch.empty(self.num_workers * wire.numel(), dtype=wire.dtype, device=wire.device)
        self._comm.all_gather(out, wire)
        return list(out.view(self.num_workers, -1))

    def predicted_gather(self, num_bytes: int, *, num_workers: int) -> Traffic:
        """The backend's all-gather: (N-1) vectors of `num_bytes` leave each rank, as around a
        ring.
        """
        traffic = Traffic()
        for rank in range(num_workers if num_workers > 1 and num_bytes else 0):
            traffic.add(
                rank, (rank + 1) % num_workers, (num_workers - 1) * num_bytes, num_workers - 1
            )

        return traffic

    def predicted_traffic(
        self, numel: int, itemsize: int, *, num_workers: int, num_servers: int = 0
    ) -> Traffic:
        return ring_traffic(numel, itemsize, num_workers, longest=max(numel, 1))
