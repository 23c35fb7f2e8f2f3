"""No compression: vectors travel as they are. Nominal ratio 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite import compression
from benchsuite.comm import Traffic
from benchsuite.compression import Codec
from benchsuite.topology import Topology
from benchsuite.workload import Shapes, numel


@dataclass
class Compression(compression.Compression):
    """The identity."""

    nominal_ratio = 1.0

    def start(self, shapes: Shapes, *, seed: int) -> None:
        """Keeps no state."""

    def mean(self, flat: Tensor, topology: Topology) -> None:
        topology.mean(flat)

    def codec(self, pieces: Sequence[int], dtype: torch.dtype, *, feedback: bool = True) -> Codec:
        return _AsItIs(sum(pieces) * dtype.itemsize)

    def settle(self, mean: Tensor) -> None:
        """A mean stays what it is."""

    def wire_bytes(self, pieces: Sequence[int], itemsize: int) -> int:
        return sum(pieces) * itemsize

    def predicted_traffic(
        self,
        shapes: Shapes,
        itemsize: int,
        topology: Topology,
        *,
        num_workers: int,
        num_servers: int = 0,
    ) -> Traffic:
        return topology.predicted_traffic(
            numel(shapes), itemsize, num_workers=num_workers, num_servers=num_servers
        )


class _AsItIs:
    """The vector's own bytes."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def encode(self, flat: Tensor) -> Tensor:
        return flat.view(torch.uint8)

    def decode(self, wire: Tensor, out: Tensor) -> None:
        out.view(torch.uint8).copy_(wire)
