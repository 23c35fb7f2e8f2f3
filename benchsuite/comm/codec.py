"""How a vector goes onto the wire and back: `Codec`, and `Encoding`, which makes one per vector.

The members are in `compression/`; a parameter server decodes with these without knowing them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """One vector's way onto the wire and back.

    Keeps what it has left out (error feedback), where it does.
    """

    num_bytes: int  # of every encoded vector

    def encode(self, flat: Tensor) -> Tensor:
        """(num_bytes,) uint8, the codec's own memory: it is sent before the next call.

        `flat` stays as it is.
        """

    def decode(self, wire: Tensor, out: Tensor) -> None:
        """Inverse of `encode`, up to its loss.

        Of any rank's wire: keeps no state, several threads may call it.
        """


class Encoding(Protocol):
    """What sender and receiver of single vectors need of a compression."""

    def codec(self, pieces: Sequence[int], dtype: torch.dtype, *, feedback: bool = True) -> Codec:
        """For a vector of consecutive tensors of these sizes: a slice that a server owns, or an
        edge of a graph.

        feedback: False where the caller keeps account of what was not sent itself (a strategy's
        copies).
        """

    def settle(self, mean: Tensor) -> None:
        """What becomes of a mean of decoded vectors, in place: itself, or a majority's vote."""

    def wire_bytes(self, pieces: Sequence[int], itemsize: int) -> int:
        """`num_bytes` of the codec of such a vector."""
