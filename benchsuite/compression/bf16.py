"""Brain float: 1 sign, 8 exponent and 7 fraction bits, the range of float32 (Kalamkar et al. 2019).
Nominal ratio 1/2.

A rounding moves a value by at most 2^-9 of itself; one step of the format is 2^-8. Sums travel and
are added in this format on every topology; a push to a server is cast, its answer is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite import compression
from benchsuite.comm import Traffic
from benchsuite.compression import Codec
from benchsuite.compression.half import HALF_BYTES, Half
from benchsuite.topology import Topology
from benchsuite.workload import Shapes


@dataclass
class Compression(compression.Compression):
    """Casts to torch.bfloat16."""

    nominal_ratio = 0.5

    def start(self, shapes: Shapes, *, seed: int) -> None:
        """Prepares the mean; its memory is made when the first vector comes."""
        self._half = Half(torch.bfloat16)

    def mean(self, flat: Tensor, topology: Topology) -> None:
        """The mean of `flat` (P,) over the workers, in place, summed in the short format."""
        self._half.mean(flat, topology)

    def codec(self, pieces: Sequence[int], dtype: torch.dtype, *, feedback: bool = True) -> Codec:
        """How one vector is encoded; nothing is kept of the error, so `feedback` has no effect."""
        return Half(torch.bfloat16).codec(pieces)

    def settle(self, mean: Tensor) -> None:
        """Leaves the mean as it is."""

    def wire_bytes(self, pieces: Sequence[int], itemsize: int) -> int:
        """Bytes of one encoded vector: two per element."""
        return sum(pieces) * HALF_BYTES

    def predicted_traffic(
        self,
        shapes: Shapes,
        itemsize: int,
        topology: Topology,
        *,
        num_workers: int,
        num_servers: int = 0,
    ) -> Traffic:
        """Traffic of one mean: that of as many elements of two bytes each."""
        return Half(torch.bfloat16).predicted_traffic(
            shapes, topology, num_workers=num_workers, num_servers=num_servers
        )
