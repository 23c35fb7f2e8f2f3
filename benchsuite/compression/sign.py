"""signSGD with majority vote: each worker sends one bit per element (Bernstein et al. 2018, arXiv
1810.05291).

The update is the sign of the sum of signs. An element >= 0 votes +1, one < 0 votes -1; where as
many vote for as against, nothing moves (the vote is 0). No error feedback. Steps have the size of
the learning rate, whatever the gradient: one that is not finite votes too (NaN: -1), so a run that
diverges shows it in its losses, not its parameters. Sends ceil(P / 8) bytes to everybody (native),
or pushes them to a server, which counts the votes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchsuite import compression
from benchsuite.comm import Traffic
from benchsuite.compression import Codec, Gathered, pieces_of
from benchsuite.compression.bits import pack_signs, packed_bytes, unpack_signs
from benchsuite.topology import Topology
from benchsuite.workload import Shapes


@dataclass
class Compression(compression.Compression):
    """The majority's sign."""

    nominal_ratio = 1 / 32
    travels_over = ("native", "server", "graph")
    travels_why = (
        "a sum of k-sparse (or 1-bit) vectors is not k-sparse (or 1-bit): it needs an all-gather "
        "or a push"
    )
    refuses = (
        {
            "rule": "compression x sync",
            "when": "not sync.takes_votes and not sync.refuses_compression",
            "reason": (
                "compression = {name} with sync = {sync.name}: a majority vote needs all votes "
                "of a step"
            ),
            "remedy": "set sync = {default.sync}, or compression = ef_sign",
        },
    )

    def start(self, shapes: Shapes, *, seed: int) -> None:
        """Prepares the gather of everybody's bits."""
        self._gathered = Gathered(partial(self.codec, pieces_of(shapes)))

    def mean(self, flat: Tensor, topology: Topology) -> None:
        """Replaces `flat` (P,) by the majority's sign of every element."""
        self._gathered.mean(flat, topology)
        self.settle(flat)

    def codec(self, pieces: Sequence[int], dtype: torch.dtype, *, feedback: bool = True) -> Codec:
        """How one vector is encoded; nothing is kept of the error, so `feedback` has no effect."""
        return Signs(sum(pieces))

    def settle(self, mean: Tensor) -> None:
        """Turns the mean of the votes into the majority's: +1, -1, or 0 for a tie."""
        mean.sign_()

    def wire_bytes(self, pieces: Sequence[int], itemsize: int) -> int:
        """Bytes of one encoded vector: a bit per element."""
        return packed_bytes(sum(pieces))

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


class Signs:
    """The codec of one vector: one bit per element stands on the wire, and nothing else."""

    def __init__(self, size: int) -> None:
        self.num_bytes = packed_bytes(size)
        self._wire = torch.empty(self.num_bytes, dtype=torch.uint8)

    def encode(self, flat: Tensor) -> Tensor:
        """The bytes to send for a vector (P,); the next call writes over them."""
        pack_signs(flat, self._wire)
        return self._wire

    def decode(self, wire: Tensor, out: Tensor) -> None:
        """Writes the votes +1 and -1 into `out` (P,)."""
        unpack_signs(wire, out)
