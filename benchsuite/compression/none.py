"""No compression: vectors travel as they are. Nominal ratio 1."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from benchsuite.comm import Traffic
from benchsuite.topology import Topology
from benchsuite.workload import Shapes, numel


@dataclass
class Compression:
    """The identity."""

    nominal_ratio = 1.0

    def start(self, shapes: Shapes, *, seed: int) -> None:
        """Keeps no state."""

    def mean(self, flat: Tensor, topology: Topology) -> None:
        topology.mean(flat)

    def encode(self, flat: Tensor) -> Tensor:
        return flat

    def decode(self, wire: Tensor, out: Tensor) -> None:
        out.copy_(wire)

    def predicted_traffic(
        self, shapes: Shapes, itemsize: int, topology: Topology, *, num_workers: int, num_servers: int = 0
    ) -> Traffic:
        return topology.predicted_traffic(numel(shapes), itemsize, num_workers=num_workers, num_servers=num_servers)
