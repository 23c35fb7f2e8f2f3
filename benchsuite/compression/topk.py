"""Top-k sparsification with error feedback: only the largest elements travel (Stich et al. 2018).

Aji and Heafield 2017; arXiv 1809.07599, algorithm 1. e <- e + g; the k = ceil(rho P) elements of
largest magnitude of e are sent as values and 4-byte indices, what was not sent stays in e for the
next time: sum sent + residual = sum of gradients. A sum of k-sparse vectors is not k-sparse, so
workers gather each other's (native), or push to a server. Sends k (itemsize + 4) bytes to
everybody: less than a dense ring where rho < 1/N (float32).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchsuite import compression
from benchsuite.comm import Traffic
from benchsuite.compression import Gathered, pieces_of
from benchsuite.topology import Topology
from benchsuite.workload import Shapes

# Bytes of an index, an int32: vectors have fewer than 2^31 elements.
INDEX_BYTES = 4

SAMPLE = 2**14  # elements that tell about where the k-th largest lies


@dataclass
class Compression(compression.Compression):
    """The largest elements of the gradient and of what was left out before."""

    rho: float = 0.01
    """Share of the elements that travels, 0 < rho <= 1."""

    label = "top-k"
    feedback = True
    travels_over = ("native", "server", "graph")
    travels_why = (
        "a sum of k-sparse (or 1-bit) vectors is not k-sparse (or 1-bit): it needs an all-gather "
        "or a push"
    )
    refuses = (
        {
            "rule": "topk",
            "when": "not 0 < rho <= 1",
            "reason": "rho = {rho:g}: the share of the elements that travels, 0 < rho <= 1",
            "remedy": "set rho = 0.01, or 1 for all of them",
        },
    )

    @property
    def nominal_ratio(self) -> float:
        """Values and indices, of float32."""
        return 2 * self.rho

    def start(self, shapes: Shapes, *, seed: int) -> None:
        """Prepares the gather; the residual is made when the first vector tells its dtype."""
        self._gathered = Gathered(partial(self.codec, pieces_of(shapes)))

    def mean(self, flat: Tensor, topology: Topology) -> None:
        """The mean of what all workers send, in place.

        `flat` (P,) has at most N k nonzero elements afterwards.
        """
        self._gathered.mean(flat, topology)

    @property
    def residual(self) -> Tensor | None:
        """What has not been sent yet (P,); None before the first mean."""
        return self._gathered.residual

    def codec(self, pieces: Sequence[int], dtype: torch.dtype, *, feedback: bool = True) -> TopK:
        """How one vector is encoded; with `feedback` the codec keeps what it leaves out."""
        return TopK(sum(pieces), self._k(pieces), dtype, feedback=feedback)

    def settle(self, mean: Tensor) -> None:
        """Leaves the mean as it is: what was left out is in the residual."""

    def wire_bytes(self, pieces: Sequence[int], itemsize: int) -> int:
        """Bytes of one encoded vector: k values and k indices.

        The indices are as large as float32 values, so half of the bytes say where and not how much.
        """
        return self._k(pieces) * (itemsize + INDEX_BYTES)

    def _k(self, pieces: Sequence[int]) -> int:
        """k = ceil(rho P), over the whole vector and not per tensor."""
        size = sum(pieces)
        return min(size, math.ceil(self.rho * size))

    def predicted_traffic(
        self,
        shapes: Shapes,
        itemsize: int,
        topology: Topology,
        *,
        num_workers: int,
        num_servers: int = 0,
    ) -> Traffic:
        """Traffic of one mean: a gather of one encoded vector of each worker.

        It grows with their number, because the union of N supports may have N k elements.
        """
        return topology.predicted_gather(
            self.wire_bytes(pieces_of(shapes), itemsize), num_workers=num_workers
        )


class TopK:
    """The codec of one vector: on the wire stand k values, then their k indices.

    With `feedback` it keeps the residual e (P,) of algorithm 1: what was asked for and not yet
    sent.
    """

    def __init__(self, size: int, k: int, dtype: torch.dtype, *, feedback: bool) -> None:
        assert size < 2**31, "indices have 4 bytes"

        self.k = k
        self._values_bytes = k * dtype.itemsize
        self.num_bytes = self._values_bytes + k * INDEX_BYTES
        self._wire = torch.empty(self.num_bytes, dtype=torch.uint8)
        self._dtype = dtype

        # Scratch for the search, kept from one vector to the next.
        self._magnitudes = torch.empty(size, dtype=dtype)
        self._below = torch.empty(size, dtype=torch.bool)
        self.residual = torch.zeros(size, dtype=dtype) if feedback else None

    def encode(self, flat: Tensor) -> Tensor:
        """The bytes to send for a vector (P,); the next call writes over them."""
        # e <- e + g, and the largest of e travel.
        whole = flat if self.residual is None else self.residual.add_(flat)  # (P,)
        indices = self._largest(whole)  # (k,)
        values = whole.index_select(0, indices)  # (k,)

        self._wire[: self._values_bytes].view(self._dtype).copy_(values)
        self._wire[self._values_bytes :].view(torch.int32).copy_(indices)

        # What travels is no longer owed.
        if self.residual is not None:
            self.residual.index_fill_(0, indices, 0.0)

        return self._wire

    def _largest(self, whole: Tensor) -> Tensor:
        """(k,) indices of the largest magnitudes; a NaN is larger than all.

        Only what may be among them is sorted, by a bound that a sample gives: 5 times faster at 11
        million elements. The answer is exact: where the bound leaves fewer than k candidates, all
        elements are searched.
        """
        magnitudes = torch.abs(whole, out=self._magnitudes)
        every = max(1, len(magnitudes) // SAMPLE)
        sample = magnitudes[::every]

        # Of the k largest about `share` are in the sample, a number that scatters by its root.
        # The bound lies six such deviations deeper, so there are hardly ever too few candidates.
        share = len(sample) * self.k / max(len(magnitudes), 1)
        rank = int(share + 6 * share**0.5 + 6)

        if len(magnitudes) > 4 * SAMPLE and 4 * rank < len(sample):
            bound = torch.topk(sample, rank, sorted=False).values.min()
            torch.lt(magnitudes, bound, out=self._below)

            # "Not below" and not "at least": a NaN is neither, and has to be found.
            candidates = self._below.logical_not_().nonzero().flatten()

            if len(candidates) >= self.k:
                found = torch.topk(magnitudes.index_select(0, candidates), self.k, sorted=False)
                return candidates.index_select(0, found.indices)

        return torch.topk(magnitudes, self.k, sorted=False).indices

    def decode(self, wire: Tensor, out: Tensor) -> None:
        """Writes the vector that was sent into `out` (P,): zero wherever nothing was."""
        # Copies: the row of another rank may begin at a byte where no value can stand.
        values = wire[: self._values_bytes].clone().view(self._dtype)
        indices = wire[self._values_bytes :].clone().view(torch.int32)

        out.zero_()
        out[indices.long()] = values
