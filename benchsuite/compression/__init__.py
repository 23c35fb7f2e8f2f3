"""What is put on the wire: `Compression`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from benchsuite.comm import Traffic
from benchsuite.topology import Topology
from benchsuite.workload import Shapes


class Compression(Protocol):
    """Stands between a strategy and its topology. `none` hands vectors on untouched."""

    nominal_ratio: float  # bytes with / bytes without

    def start(self, shapes: Shapes, *, seed: int) -> None:
        """State (residuals, random streams) for vectors of these shapes."""

    def mean(self, flat: Tensor, topology: Topology) -> None:
        """The compressed mean over the workers, in place."""

    def encode(self, flat: Tensor) -> Tensor:
        """What a push puts on the wire."""

    def decode(self, wire: Tensor, out: Tensor) -> None:
        """Inverse of `encode`, up to its loss, into `out`."""

    def predicted_traffic(
        self, shapes: Shapes, itemsize: int, topology: Topology, *, num_workers: int, num_servers: int = 0
    ) -> Traffic:
        """Traffic of ONE `mean` of a vector of these shapes."""
