"""What is put on the wire: `Compression`, and `Codec`, how one vector goes there.

A `mean` over workers goes one of three ways: a linear compression sums what it sends on any
topology (`fp16`, `bf16`, `powersgd`); what cannot be summed is gathered and summed after decoding,
in rank order (`Gathered`); and a push to a parameter server is encoded by the worker and decoded by
the server's loop, whose policy never sees the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from benchsuite.comm import Traffic
from benchsuite.comm.codec import Codec, Encoding
from benchsuite.topology import Topology
from benchsuite.workload import Shapes, pieces_of

__all__ = ["Codec", "Compression", "Gathered", "pieces_of"]


class Compression(Encoding, Protocol):
    """What is put on the wire: one file in `compression/`, whose class inherits from this one.

    It is a dataclass that stands between a strategy and its topology. `none` hands vectors on
    untouched.
    """

    @property
    def nominal_ratio(self) -> float:
        """Bytes with compression over bytes without, as its paper counts them, of float32.

        The traffic that is measured may differ: headers, padding and the topology come on top.
        """

    def start(self, shapes: Shapes, *, seed: int) -> None:
        """Makes the state (residuals, random streams) for vectors of these shapes.

        The seed is the same on all workers, so that streams which they must share are.
        """

    def mean(self, flat: Tensor, topology: Topology) -> None:
        """The compressed mean over the workers, in place, the same bits on all."""

    def predicted_traffic(
        self,
        shapes: Shapes,
        itemsize: int,
        topology: Topology,
        *,
        num_workers: int,
        num_servers: int = 0,
    ) -> Traffic:
        """Traffic of ONE `mean` of a vector of these shapes.

        itemsize: bytes of an element of the vector, before compression.
        """


class Gathered:
    """The mean of what cannot be summed on its way.

    Every worker's encoded vector goes to everybody, is decoded and added in rank order, and the sum
    is divided once. A scratch vector of M bytes is kept, because fresh memory of that size costs
    more than the arithmetic.
    """

    def __init__(self, make_codec: Callable[[torch.dtype], Codec]) -> None:
        """Prepares the mean; `make_codec` is called by the first, which tells the dtype."""
        self._make_codec = make_codec
        self._codec: Codec | None = None
        self._one: Tensor | None = None

    @property
    def residual(self) -> Tensor | None:
        """What has not been sent yet (P,); None before the first mean, or where nothing is kept."""
        return getattr(self._codec, "residual", None)

    def mean(self, flat: Tensor, topology: Topology) -> None:
        """The mean of `flat` (P,) over the workers, in place.

        Everybody adds the same rows in the same order, so all have the same bits.
        """
        if self._codec is None:
            self._codec = self._make_codec(flat.dtype)

        rows = topology.gather(self._codec.encode(flat))  # one per worker, of bytes
        if self._one is None:
            self._one = torch.empty_like(flat)

        # The own vector is encoded by now, so the sum may be made in its place.
        self._codec.decode(rows[0], flat)
        for row in rows[1:]:
            self._codec.decode(row, self._one)
            flat.add_(self._one)

        flat.div_(len(rows))
