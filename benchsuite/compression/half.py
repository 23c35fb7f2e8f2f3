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
    """The mean in a float of two bytes: a vector is cast to `dtype`, averaged, and cast back.

    The members `fp16` and `bf16` hold one and hand their calls on to it.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._short: Tensor | None = None

    def mean(self, flat: Tensor, topology: Topology) -> None:
        """The mean of `flat` (P,) over the workers, in place.

        The sum itself is made in the short format, so it may overflow in fp16 where no worker's
        vector does.
        """
        if self._short is None:
            self._short = torch.empty_like(flat, dtype=self._dtype)

        topology.mean(self._short.copy_(flat))
        flat.copy_(self._short)

    def codec(self, pieces: Sequence[int]) -> Codec:
        """How one vector is encoded for a push to a server."""
        return HalfCodec(sum(pieces), self._dtype)

    def predicted_traffic(
        self, shapes: Shapes, topology: Topology, *, num_workers: int, num_servers: int
    ) -> Traffic:
        """Traffic of one mean: that of as many elements of two bytes each."""
        return topology.predicted_traffic(
            numel(shapes), HALF_BYTES, num_workers=num_workers, num_servers=num_servers
        )


class HalfCodec:
    """The codec of one vector: two bytes per element stand on the wire, and nothing else."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.num_bytes = size * HALF_BYTES
        self._short = torch.empty(size, dtype=dtype)

    def encode(self, flat: Tensor) -> Tensor:
        """The bytes to send for a vector (P,); the next call writes over them."""
        return self._short.copy_(flat).view(torch.uint8)

    def decode(self, wire: Tensor, out: Tensor) -> None:
        """Writes the vector that was sent into `out` (P,).

        A row of a gather may begin at an odd byte, where no number of two bytes can stand: such a
        row is copied first.
        """
        if wire.storage_offset() % HALF_BYTES != 0:
            wire = wire.clone()

        out.copy_(wire.view(self._short.dtype))
