"""The backend's own all-reduce (gloo: a segmented ring; NCCL: its choice).

Sends 2 (N-1)/N * M bytes per rank (nominal on NCCL). Library collectives are not counted but derived: calls and
sizes seen by a dispatch mode, times the ring's factor (Patarasuk and Yuan 2009).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite.comm import Comm, Traffic
from benchsuite.topology import ring_traffic


@dataclass
class Topology:
    """all_reduce of the backend."""

    payload_source = "derived"
    timing_free = True
    num_workers = 0
    num_servers = 0

    def start(self, comm: Comm, *, num_servers: int = 0) -> None:
        assert num_servers == 0, "rules: servers need parameter_server"
        self._comm, self.num_workers = comm, comm.size

    def buffer(self, numel: int, like: Tensor) -> Tensor:
        return torch.zeros(numel, dtype=like.dtype, device=like.device)

    def mean(self, flat: Tensor) -> None:
        if self.num_workers > 1:
            self._comm.all_reduce(flat)
            flat.div_(self.num_workers)

    def predicted_traffic(self, numel: int, itemsize: int, *, num_workers: int, num_servers: int = 0) -> Traffic:
        return ring_traffic(numel, itemsize, num_workers, longest=max(numel, 1))
