"""What `fp16` and `bf16` share: vectors in a float of two bytes, summed as they are on any
topology.

Linear: the sum of what travels is what is wanted, so collectives add in the short format and only
then everything is cast back. Pushes to a server are cast; answers are parameters and are not, so
3/4 of the bytes remain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchsuite.comm import Traffic
from benchsuite.compression import Codec
from benchsuite.topology import Topology
from benchsuite.workload import Shapes, numel

HALF_BYTES = 2


class Half:
    """Casts to `dtype` and back."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._short: Tensor | None = None

    def mean(self, flat: Tensor, topology: Topology) -> None:
        """In place."""
        if self._short is None:
            self._short = torch.empty_like(flat, dtype=self._dtype)

        topology.mean(self._short.copy_(flat))
        flat.copy_(self._short)

    def codec(self, pieces: Sequence[int]) -> Codec:
        """Of a push."""
        return HalfCodec(sum(pieces), self._dtype)

    def predicted_traffic(
        self, shapes: Shapes, topology: Topology, *, num_workers: int, num_servers: int
    ) -> Traffic:
        """Of one mean."""
        return topology.predicted_traffic(
            numel(shapes), HALF_BYTES, num_workers=num_workers, num_servers=num_servers
        )


class HalfCodec:
    """Two bytes per element."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.num_bytes = size * HALF_BYTES
        self._short = torch.empty(size, dtype=dtype)

    def encode(self, flat: Tensor) -> Tensor:
        return self._short.copy_(flat).view(torch.uint8)

    def decode(self, wire: Tensor, out: Tensor) -> None:
        aligned = wire.storage_offset() % HALF_BYTES == 0
        out.copy_((wire if aligned else wire.clone()).view(self._short.dtype))
