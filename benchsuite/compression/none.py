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
    """Hands every vector on as it is: the codec copies nothing, the mean is the topology's."""

    nominal_ratio = 1.0

    def start(self, shapes: Shapes, *, seed: int) -> None:
        """Keeps no state."""

    def mean(self, flat: Tensor, topology: Topology) -> None:
        """The mean of `flat` (P,) over the workers, in place, by the topology alone."""
        topology.mean(flat)

    def codec(self, pieces: Sequence[int], dtype: torch.dtype, *, feedback: bool = True) -> Codec:
        """The codec that does nothing.

        Strategies push through whatever codec is set, and need not ask whether there is one.
        """
        return _AsItIs(sum(pieces) * dtype.itemsize)

    def settle(self, mean: Tensor) -> None:
        """Leaves the mean as it is."""

    def wire_bytes(self, pieces: Sequence[int], itemsize: int) -> int:
        """Bytes of a vector that travels as it is."""
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
        """Traffic of one mean, as the topology alone makes it."""
        return topology.predicted_traffic(
            numel(shapes),
            itemsize,
            num_workers=num_workers,
            num_servers=num_servers,
        )


class _AsItIs:
    """The codec of one vector that sends the vector's own bytes.

    Nothing is copied on the sender's side: what it returns is the vector itself, seen as bytes.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def encode(self, flat: Tensor) -> Tensor:
        """The vector (P,), seen as bytes: it may not change before they are sent."""
        return flat.view(torch.uint8)

    def decode(self, wire: Tensor, out: Tensor) -> None:
        """Writes the bytes that came into `out` (P,).

        It is `out` that is seen as bytes, not the wire, which may begin anywhere.
        """
        out.view(torch.uint8).copy_(wire)
