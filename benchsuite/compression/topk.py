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
        self._gathered = Gathered(partial(self.codec, pieces_of(shapes)))

    def mean(self, flat: Tensor, topology: Topology) -> None:
        self._gathered.mean(flat, topology)

    @property
    def residual(self) -> Tensor | None:
        """What has not been sent yet (P,); None before the first mean."""
        return self._gathered.residual

    def codec(self, pieces: Sequence[int], dtype: torch.dtype, *, feedback: bool = True) -> TopK:
        return TopK(sum(pieces), self._k(pieces), dtype, feedback=feedback)

    def settle(self, mean: Tensor) -> None:
        """A mean stays what it is."""

    def wire_bytes(self, pieces: Sequence[int], itemsize: int) -> int:
        return self._k(pieces) * (itemsize + INDEX_BYTES)

    def _k(self, pieces: Sequence[int]) -> int:
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
        return topology.predicted_gather(
            self.wire_bytes(pieces_of(shapes), itemsize), num_workers=num_workers
        )


class TopK:
    """k values, then k indices."""

    def __init__(self, size: int, k: int, dtype: torch.dtype, *, feedback: bool) -> None:
        assert size < 2**31, "indices have 4 bytes"
        self.k = k
        self._values_bytes = k * dtype.itemsize
        self.num_bytes = self._values_bytes + k * INDEX_BYTES
        self._wire = torch.empty(self.num_bytes, dtype=torch.uint8)
        self._dtype = dtype
        self._magnitudes = torch.empty(size, dtype=dtype)
        self._below = torch.empty(size, dtype=torch.bool)
        self.residual = torch.zeros(size, dtype=dtype) if feedback else None

    def encode(self, flat: Tensor) -> Tensor:
        whole = flat if self.residual is None else self.residual.add_(flat)
        indices = self._largest(whole)
        self._wire[: self._values_bytes].view(self._dtype).copy_(whole.index_select(0, indices))
        self._wire[self._values_bytes :].view(torch.int32).copy_(indices)

        if self.residual is not None:
            self.residual.index_fill_(0, indices, 0.0)

        return self._wire

    def _largest(self, whole: Tensor) -> Tensor:
        """(k,) indices of the largest magnitudes; a NaN is larger than all.

        Only what may be among them is sorted, by a bound that a sample gives: 5 times faster at 11
        million elements.
        """
        magnitudes = torch.abs(whole, out=self._magnitudes)
        sample = magnitudes[:: max(1, len(magnitudes) // SAMPLE)]
        share = len(sample) * self.k / max(len(magnitudes), 1)
        rank = int(share + 6 * share**0.5 + 6)  # six deviations deeper: hardly ever too few

        if len(magnitudes) > 4 * SAMPLE and 4 * rank < len(sample):
            bound = torch.topk(sample, rank, sorted=False).values.min()
            torch.lt(magnitudes, bound, out=self._below)
            candidates = self._below.logical_not_().nonzero().flatten()  # not (x < bound): NaN too

            if len(candidates) >= self.k:
                found = torch.topk(magnitudes.index_select(0, candidates), self.k, sorted=False)
                return candidates.index_select(0, found.indices)

        return torch.topk(magnitudes, self.k, sorted=False).indices

    def decode(self, wire: Tensor, out: Tensor) -> None:
        values = (
            wire[: self._values_bytes].clone().view(self._dtype)
        )  # a copy: a row may begin anywhere

        indices = wire[self._values_bytes :].clone().view(torch.int32)
        out.zero_()
        out[indices.long()] = values
