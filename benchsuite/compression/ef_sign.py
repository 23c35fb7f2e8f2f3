"""Sign with error feedback: one bit per element and a scale per tensor (Karimireddy et al. 2019,
arXiv 1901.09847).

e <- e + g; sent is mean|e| sign(e), per tensor (algorithm 1, scaled sign), and e keeps the rest:
sum sent + residual = sum of gradients. Sends 4 bytes per tensor and ceil(P / 8) to everybody
(native), or pushes them to a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchsuite import compression
from benchsuite.comm import Traffic
from benchsuite.compression import Gathered, pieces_of
from benchsuite.compression.bits import pack_signs, packed_bytes, unpack_signs
from benchsuite.topology import Topology
from benchsuite.workload import Shapes

# Bytes of a tensor's scale, a float32.
SCALE_BYTES = 4


@dataclass
class Compression(compression.Compression):
    """Scaled signs of the gradient and of what was left out before."""

    nominal_ratio = 1 / 32
    feedback = True
    travels_over = ("native", "server", "graph")
    travels_why = (
        "a sum of k-sparse (or 1-bit) vectors is not k-sparse (or 1-bit): it needs an all-gather "
        "or a push"
    )

    def start(self, shapes: Shapes, *, seed: int) -> None:
        """Prepares the gather; the residual is made when the first vector tells its dtype."""
        self._gathered = Gathered(partial(self.codec, pieces_of(shapes)))

    def mean(self, flat: Tensor, topology: Topology) -> None:
        """The mean of the workers' scaled signs, in place of `flat` (P,).

        It is no vector of signs: N of them have N + 1 possible sums.
        """
        self._gathered.mean(flat, topology)

    @property
    def residual(self) -> Tensor | None:
        """What has not been sent yet (P,); None before the first mean."""
        return self._gathered.residual

    def codec(
        self, pieces: Sequence[int], dtype: torch.dtype, *, feedback: bool = True
    ) -> ScaledSigns:
        """How one vector is encoded; with `feedback` the codec keeps what its signs lose."""
        return ScaledSigns(pieces, dtype, feedback=feedback)

    def settle(self, mean: Tensor) -> None:
        """Leaves the mean as it is: what the signs lose is in the residual."""

    def wire_bytes(self, pieces: Sequence[int], itemsize: int) -> int:
        """Bytes of one encoded vector: a scale per tensor and a bit per element.

        The signs of all tensors stand in one run, so only its last byte may be filled up.
        """
        return len(pieces) * SCALE_BYTES + packed_bytes(sum(pieces))

    def predicted_traffic(
        self,
        shapes: Shapes,
        itemsize: int,
        topology: Topology,
        *,
        num_workers: int,
        num_servers: int = 0,
    ) -> Traffic:
        """Traffic of one mean: a gather of one encoded vector of each worker."""
        return topology.predicted_gather(
            self.wire_bytes(pieces_of(shapes), itemsize), num_workers=num_workers
        )


class ScaledSigns:
    """The codec of one vector: on the wire stand a float32 per tensor, then one bit per element.

    With `feedback` it keeps the residual e (P,) of algorithm 1: what was asked for and not yet
    sent.
    """

    def __init__(self, pieces: Sequence[int], dtype: torch.dtype, *, feedback: bool) -> None:
        self._pieces = list(pieces)
        self._scales_bytes = len(pieces) * SCALE_BYTES
        self.num_bytes = self._scales_bytes + packed_bytes(sum(pieces))
        self._wire = torch.empty(self.num_bytes, dtype=torch.uint8)

        self.residual = torch.zeros(sum(pieces), dtype=dtype) if feedback else None
        self._sent = torch.empty(sum(pieces) if feedback else 0, dtype=dtype)

    def encode(self, flat: Tensor) -> Tensor:
        """The bytes to send for a vector (P,); the next call writes over them."""
        # e <- e + g.
        whole = flat if self.residual is None else self.residual.add_(flat)  # (P,)

        if not self._pieces:
            return self._wire

        # mean|e| of each tensor, and the signs of all elements.
        scales = torch.stack([piece.abs().mean() for piece in whole.split(self._pieces)])
        self._wire[: self._scales_bytes].view(torch.float32).copy_(scales)
        pack_signs(whole, self._wire[self._scales_bytes :])

        # e <- e - sent. What was sent is decoded again rather than computed: the wire's scale is
        # rounded to float32, and the difference is owed too.
        if self.residual is not None:
            self.decode(self._wire, self._sent)
            self.residual.sub_(self._sent)

        return self._wire

    def decode(self, wire: Tensor, out: Tensor) -> None:
        """Writes scale times sign of every element into `out` (P,)."""
        # A copy: the row of another rank may begin at a byte where no float32 can stand.
        header = wire[: self._scales_bytes].clone()
        scales = header.view(torch.float32).tolist()

        unpack_signs(wire[self._scales_bytes :], out)
        if scales:
            torch._foreach_mul_(out.split(self._pieces), scales)
