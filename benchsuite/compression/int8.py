"""8-bit quantisation: a range per tensor, 255 steps, the nearest (Alistarh et al. 2017, QSGD).
Nominal ratio 1/4.

|error| <= range / 255 per quantisation. Never summed in int8 (100 + 100 = -56): scatter to the
owners of chunks and gather on `direct`, or a push to a server. No error feedback. Sends P + 8 bytes
per tensor instead of 4 P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite import compression
from benchsuite.comm import Traffic
from benchsuite.compression import Codec
from benchsuite.compression.quantise import Quantised
from benchsuite.topology import Topology
from benchsuite.workload import Shapes

BITS = 8


@dataclass
class Compression(compression.Compression):
    """One byte per element."""

    nominal_ratio = BITS / 32
    travels_over = ("direct", "server", "graph")
    travels_why = "int8 is never summed in int8 (100 + 100 = -56)"

    def start(self, shapes: Shapes, *, seed: int) -> None:
        """Prepares the quantised mean for vectors of these shapes."""
        self._quantised = Quantised(BITS)
        self._quantised.start(shapes, seed=seed)

    def mean(self, flat: Tensor, topology: Topology) -> None:
        """The mean of `flat` (P,), every element sent as one byte, in place."""
        self._quantised.mean(flat, topology)

    def codec(self, pieces: Sequence[int], dtype: torch.dtype, *, feedback: bool = True) -> Codec:
        """How one vector is encoded: a range per tensor, then a byte per element."""
        return Quantised(BITS).codec(pieces, dtype)

    def settle(self, mean: Tensor) -> None:
        """Leaves the mean as it is.

        It has been decoded by then, and nothing is kept of the error.
        """

    def wire_bytes(self, pieces: Sequence[int], itemsize: int) -> int:
        """Bytes of one encoded vector."""
        return Quantised(BITS).wire_bytes(pieces, itemsize)

    def predicted_traffic(
        self,
        shapes: Shapes,
        itemsize: int,
        topology: Topology,
        *,
        num_workers: int,
        num_servers: int = 0,
    ) -> Traffic:
        return Quantised(BITS).predicted_traffic(
            shapes, itemsize, topology, num_workers=num_workers, num_servers=num_servers
        )
