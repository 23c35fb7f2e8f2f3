"""PowerSGD: low-rank gradients, a step of power iteration per step of training (Vogels et al.
2019).

arXiv 1905.13727. Per n x m matrix M = gradient + error: P = M Q, mean of P, orthogonalise P, Q =
M^T P, mean of Q, the mean gradient is P Q^T, and error = M - P Q^T stays on the worker (algorithms
1 and 2; Q is kept as the next start). Linear, so the means are taken on any collective: all P and
the vectors that are sent as they are in a first one, all Q in a second. A tensor is sent as it is
where r (n + m) >= n m, and where it is no matrix. Lossless where r >= min(n, m). Sends r (n + m)
elements per matrix instead of n m. Keeps M of errors, the factors, and what is sent as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite import compression
from benchsuite.comm import Traffic
from benchsuite.compression import Codec
from benchsuite.errors import UsageError
from benchsuite.topology import Topology
from benchsuite.workload import Shapes, numel, views


@dataclass
class Compression(compression.Compression):
    """Two thin factors in the place of each matrix."""

    rank: int = 2
    """r, columns of the factors."""

    nominal_ratio = 0.0  # of its shapes, once started
    label = "PowerSGD"
    feedback = True
    travels_over = ("collective",)
    travels_why = "its low-rank factors are summed by all-reduce, not on a server"
    refuses = (
        {
            "rule": "powersgd",
            "when": "rank < 1",
            "reason": "rank = {rank:g}: a factor has 1 column or more",
            "remedy": "set rank = 1, 2 or 4",
        },
    )

    def start(self, shapes: Shapes, *, seed: int) -> None:
        """Finds out which tensors travel as factors; memory is made when the first vector comes."""
        self._shapes = shapes
        self._seed = seed
        self._matrices = {name: shape for name, shape in shapes.items() if self.factors(shape)}

        first, second = self.element_counts(shapes)
        self.nominal_ratio = (first + second) / numel(shapes)
        self.residual: Tensor | None = None  # (P,), made when the first gradient tells its dtype

    def factors(self, shape: torch.Size) -> bool:
        """Whether a tensor travels as two factors: where they are smaller than the matrix.

        r (n + m) < n m of a tensor seen as an n x m matrix.
        """
        if len(shape) < 2:
            return False

        return self.rank * (shape[0] + columns(shape)) < shape.numel()

    def element_counts(self, shapes: Shapes) -> tuple[int, int]:
        """Elements of the two vectors that are averaged.

        The first holds all P and what is sent as it is, the second all Q.
        """
        first = 0
        second = 0

        for shape in shapes.values():
            if self.factors(shape):
                r = self._r(shape)
                first += r * shape[0]
                second += r * columns(shape)
            else:
                first += shape.numel()

        return first, second

    def mean(self, flat: Tensor, topology: Topology) -> None:
        """Replaces the gradient `flat` (P,) by its low-rank mean over the workers.

        Algorithm 1 of the paper for all matrices at once, so that a step costs two collectives and
        not two per matrix. What the factors lose stays in `residual` and is added the next time
        (algorithm 2).
        """
        if self.residual is None:
            self._make_state(flat)

        assert self.residual is not None

        # M = gradient + error, of every tensor.                                   (n, m) each
        flat.add_(self.residual)
        whole = views(flat, self._shapes)
        matrices = {name: whole[name].view(shape[0], -1) for name, shape in self._matrices.items()}

        # P = M Q, next to the tensors that are sent as they are.
        p = views(self._first[: self._p_size], self._p_shapes)

        for name, matrix in matrices.items():
            torch.mm(matrix, self._q[name], out=p[name])  # (n, r)

        plain = [whole[name].flatten() for name in self._shapes if name not in self._matrices]
        if plain:
            torch.cat(plain, out=self._first[self._p_size :])

        topology.mean(self._first)

        # P is the same on all workers from here on, and Q = M^T P.
        for name, matrix in matrices.items():
            orthogonalise(p[name])
            torch.mm(matrix.t(), p[name], out=self._q[name])  # (m, r)

        if matrices:
            topology.mean(self._second)

        # The mean gradient P Q^T takes M's place, and M - P Q^T is the new error.
        errors = views(self.residual, self._shapes)
        for name, matrix in matrices.items():
            error = errors[name].view_as(matrix)
            error.copy_(matrix)
            torch.mm(p[name], self._q[name].t(), out=matrix)  # (n, m)
            error.sub_(matrix)

        # The others' means go back to where they came from: each `tensor` is a view of `flat`.
        rest = self._first[self._p_size :].split([tensor.numel() for tensor in plain])
        for tensor, mean in zip(plain, rest, strict=True):
            tensor.copy_(mean)

    def _make_state(self, flat: Tensor) -> None:
        """Makes the error, the two vectors that are averaged, and the first Q.

        Q is drawn from the seed alone: with different starts the mean of the P would be the mean of
        projections onto different spaces.
        """
        self.residual = torch.zeros_like(flat)

        first, second = self.element_counts(self._shapes)
        self._first = flat.new_empty(first)
        self._second = flat.new_empty(second)

        self._p_shapes = {
            name: torch.Size([shape[0], self._r(shape)]) for name, shape in self._matrices.items()
        }

        q_shapes = {
            name: torch.Size([columns(shape), self._r(shape)])
            for name, shape in self._matrices.items()
        }

        self._p_size = numel(self._p_shapes)

        # Drawn in float64 whatever the vector's dtype is, so that all dtypes begin alike.
        generator = torch.Generator().manual_seed(self._seed)
        start = torch.randn(second, generator=generator, dtype=torch.float64)
        self._second.copy_(start)
        self._q = views(self._second, q_shapes)

    def _r(self, shape: torch.Size) -> int:
        """r of one matrix.

        Its rank is at most the smaller of its sides, and more columns would be noise.
        """
        return min(self.rank, shape[0], columns(shape))

    def codec(self, pieces: Sequence[int], dtype: torch.dtype, *, feedback: bool = True) -> Codec:
        """UsageError: a push has no second mean, and its factors would differ between workers."""
        raise UsageError(
            "compression = powersgd for a push: its factors are summed by all-reduce, not on a "
            "server or an edge; set "
            "topology to a collective, or compression to topk or fp16"
        )

    def settle(self, mean: Tensor) -> None:
        """Leaves the mean as it is: P Q^T is what the paper steps with."""

    def wire_bytes(self, pieces: Sequence[int], itemsize: int) -> int:
        """UsageError: a vector alone has no encoding."""
        raise UsageError(
            "compression = powersgd sends no single vectors: set topology to a collective"
        )

    def predicted_traffic(
        self,
        shapes: Shapes,
        itemsize: int,
        topology: Topology,
        *,
        num_workers: int,
        num_servers: int = 0,
    ) -> Traffic:
        """Traffic of the means of a step.

        There are two, or one where no tensor travels as factors: an empty vector is not sent.
        """
        means = [count for count in self.element_counts(shapes) if count]
        return Traffic.total(
            topology.predicted_traffic(count, itemsize, num_workers=num_workers) for count in means
        )


def columns(shape: torch.Size) -> int:
    """m of a tensor seen as an n x m matrix."""
    return math.prod(shape[1:])


def orthogonalise(matrix: Tensor) -> None:
    """Makes the columns of an (n, r) matrix orthonormal in place, by a QR decomposition.

    QR leaves the sign of each column open. Here R's diagonal is made positive, as Gram-Schmidt has
    it in the paper, so that all ranks agree.
    """
    q, r = torch.linalg.qr(matrix)  # (n, r), (r, r)

    signs = torch.sign(torch.diagonal(r))  # (r,)
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)

    matrix.copy_(q * signs)
