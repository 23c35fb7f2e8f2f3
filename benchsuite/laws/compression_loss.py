"""Laws of what compressed means lose.

With feedback nothing is lost for good; without it as much as theory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchsuite.compression.ef_sign import Compression as ScaledSign
from benchsuite.compression.ef_sign import ScaledSigns
from benchsuite.compression.powersgd import Compression as PowerSGD
from benchsuite.laws import Figure, Law, MakeRanks, compression
from benchsuite.laws.codecs import vector
from benchsuite.laws.compression import (
    CASES,
    ROUNDS,
    Given,
    Mean,
    after,
    control,
    is_of,
    means,
    own_last,
    random_vectors,
)
from benchsuite.laws.harness.runs import count_different, relative, with_options, worst
from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell, resolve
from benchsuite.topology import Topology
from benchsuite.worker import setup

FLOAT64 = 1e-12
LOSSLESS = 1e-10
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}  # the relative error of one rounding
# The absolute error of numbers that are smaller than the format's normal ones.
SMALLEST = {"fp16": 2.0**-24, "bf16": 2.0**-133}
QUANTISED_HOP = 0.501  # half a step, and a little for ranges that travel as float32


def of_low_rank(cell: Cell, rank: int, case: str, round_: int) -> Tensor:
    """Vectors whose tensors, as matrices, are sums of two outer products.

    The two are the same on all ranks, so that the ranks' mean is such a sum too.
    """
    flat = []
    for number, shape in enumerate(CASES[case].values()):
        rows = shape[0] if shape else 1
        left = vector(number, 2 * rows, torch.float64).view(rows, 2)
        right = vector(50 + number, 2 * (shape.numel() // rows), torch.float64).view(2, -1)
        scales = vector(1000 * round_ + rank, 2, torch.float64)
        flat.append(((left * scales) @ right).flatten())
    return torch.cat(flat).to(setup.DTYPES[cell.precision])


def feedback(make_ranks: MakeRanks, cell: Cell, *, mean: Mean | None = None) -> Figure:
    """With feedback, all means and what ranks have left add up to the mean of what was given.

    Bound: a relative error of 1e-12. The twins drop what is left over or do not divide by N.
    """
    cell = resolve(cell)
    ranks = means(make_ranks, cell, mean=mean)
    figures: list[tuple[float, str]] = []
    for case in CASES:
        given = sum(_dense(cell, random_vectors, case, round_) for round_ in range(ROUNDS))
        got = sum(ranks[0].results[case, round_] for round_ in range(ROUNDS))
        left = sum(torch.zeros(1) if rank.left[case] is None else rank.left[case] for rank in ranks)  # type: ignore[misc]
        assert isinstance(given, Tensor) and isinstance(left, Tensor)
        figures.append((relative(got + left / cell.replicas - given, given), case))
    value, where = worst(figures)
    return Figure(value, FLOAT64, f"||sent + left - given|| / ||given||, {where}, {cell.label}")


def is_the_dense_mean(
    make_ranks: MakeRanks,
    cell: Cell,
    *,
    bound: float,
    given: Given = random_vectors,
    mean: Mean | None = None,
    made: Callable[[], Any] | None = None,
) -> Figure:
    """Nothing is lost: every mean is that of the vectors themselves."""
    cell = resolve(cell)
    value, where = worst(
        [
            (relative(result - dense, dense), f"{key}")
            for rank in means(make_ranks, cell, given=given, mean=mean, made=made)
            for key, result in rank.results.items()
            for dense in [_dense(cell, given, *key)]
        ]
    )
    return Figure(value, bound, f"||mean - dense mean|| / ||dense mean||, {where}, {cell.label}")


def all_elements(make_ranks: MakeRanks, cell: Cell, *, rho: float = 1.0) -> Figure:
    """Top-k with k = P is the dense mean.

    Bound: a relative error of 1e-12. In the twin one element in ten stays behind.
    """
    return is_the_dense_mean(make_ranks, with_options(cell, "topk", rho=rho), bound=FLOAT64)


class FullRank(PowerSGD):
    """PowerSGD that sends every matrix as two factors, though they are larger than the matrix."""

    def factors(self, shape: torch.Size) -> bool:
        return len(shape) > 1


def full_rank(make_ranks: MakeRanks, cell: Cell, *, rank: int = 99) -> Figure:
    """PowerSGD is the dense mean where it has as many columns as any matrix's smaller side.

    Bound: a relative error of 1e-10. The twin has one column too few.
    """
    return is_the_dense_mean(make_ranks, cell, bound=LOSSLESS, made=lambda: FullRank(rank=rank))


def rank_of_the_mean(make_ranks: MakeRanks, cell: Cell, *, rank: int = 2) -> Figure:
    """PowerSGD is the dense mean where it has as many columns as the mean has rank.

    Bound: a relative error of 1e-10. The twin has one column too few.
    """
    return is_the_dense_mean(
        make_ranks, cell, bound=LOSSLESS, given=of_low_rank, made=lambda: FullRank(rank=rank)
    )


def within_roundings(make_ranks: MakeRanks, cell: Cell, *, mean: Mean | None = None) -> Figure:
    """A mean in half precision is off by N + 1 roundings of the mean of |x| at most.

    There is one rounding of what each rank puts in, N - 1 of sums, and one of the quotient. Bound:
    1, a share of what is allowed. The twins do not divide by N or leave one element unreduced.
    """
    cell = resolve(cell)
    name = plugins.stem(cell.compression)
    size = cell.replicas
    figures = []
    for rank in means(make_ranks, cell, mean=mean):
        for (case, round_), result in rank.results.items():
            error = (result - _dense(cell, random_vectors, case, round_)).abs()
            magnitude = _dense(cell, lambda *key: random_vectors(*key).abs(), case, round_)
            allowed = (size + 1) * (ROUNDING[name] * magnitude + SMALLEST[name])
            figures.append((float((error / allowed).max()), f"{case}, round {round_}"))
    value, where = worst(figures)
    return Figure(value, 1.0, f"largest error in units of N + 1 roundings, {where}, {cell.label}")


def within_two_hops(
    make_ranks: MakeRanks, cell: Cell, *, mean: Mean | None = None, bits: int = 8
) -> Figure:
    """Quantised means on `direct` are off by half a step per hop at most.

    Every vector is quantised on its way to the owners of chunks, and their mean on its way back.
    Bound: 0.501 steps for each hop, where the second's range is a little wider. The twins leave one
    element unreduced, or are judged by one bit too many.
    """
    cell = resolve(cell)
    figures = []
    for rank in means(make_ranks, cell, mean=mean):
        for (case, round_), result in rank.results.items():
            sizes = [shape.numel() for shape in CASES[case].values()]
            error = (result - _dense(cell, random_vectors, case, round_)).abs().split(sizes)
            vectors = [
                random_vectors(cell, worker, case, round_).split(sizes)
                for worker in range(cell.replicas)
            ]
            for number, piece in enumerate(error):
                steps = [
                    float(each[number].max() - each[number].min()) / (2**bits - 1)
                    for each in vectors
                ]
                # The range of a mean is at most the mean of the ranges.
                step = max(sum(steps) / len(steps), 1e-6)
                figures.append(
                    (float(piece.max()) / step / 2, f"{case}, tensor {number}, round {round_}")
                )
    value, where = worst(figures)
    # The second hop's range is that of a mean which is off by half a step at either end.
    return Figure(
        value,
        QUANTISED_HOP + 2 / (2**bits - 1),
        f"steps off per hop at most, {where}, {cell.label}",
    )


def is_the_majority(make_ranks: MakeRanks, cell: Cell, *, mean: Mean | None = None) -> Figure:
    """A vote is +1 where more workers have an element >= 0 than below, -1 where fewer, 0 at a tie.

    Bound: exact. In the twins a tie counts as +1, or the sign of the mean is taken.
    """
    cell = resolve(cell)
    different = 0
    ties = 0
    for rank in means(make_ranks, cell, mean=mean):
        for (case, round_), result in rank.results.items():
            rows = [random_vectors(cell, worker, case, round_) for worker in range(cell.replicas)]
            votes = sum((row >= 0).to(torch.int64) for row in rows)
            assert isinstance(votes, Tensor)
            majority = torch.sign(2 * votes - cell.replicas)
            different = different + count_different(result, majority.to(result))
            ties = int((majority == 0).sum())
    return Figure(
        different, 0, f"{different} elements are not the majority's ({ties} ties), {cell.label}"
    )


def is_scaled_signs(
    make_ranks: MakeRanks, cell: Cell, *, made: Callable[[], Any] | None = None
) -> Figure:
    """The mean of `ef_sign` is that of Algorithm 1 of Karimireddy et al. 2019, in one process.

    e <- e + g; sent is mean|e| sign(e) per tensor; e keeps the rest. The scale travels as float32.
    Bound: a relative error of 1e-12. The twins shrink the scale or use one for all tensors.
    """
    cell = resolve(cell)
    ranks = means(make_ranks, cell, made=made)
    figures = []
    for case, shapes in CASES.items():
        sizes = [shape.numel() for shape in shapes.values()]
        left = [torch.zeros(sum(sizes), dtype=torch.float64) for _ in ranks]
        for round_ in range(ROUNDS):
            total = torch.zeros_like(left[0])
            for worker, residual in enumerate(left):
                residual += random_vectors(cell, worker, case, round_)
                sent = torch.cat([_scaled_sign(piece) for piece in residual.split(sizes)])
                residual -= sent
                total += sent
            mean = total / len(ranks)
            results = [rank.results[case, round_] for rank in ranks]
            figures += [
                (relative(result - mean, mean), f"{case}, round {round_}") for result in results
            ]
    value, where = worst(figures)
    return Figure(
        value, FLOAT64, f"||mean - mean of scaled signs|| / ||mean||, {where}, {cell.label}"
    )


def _scaled_sign(tensor: Tensor) -> Tensor:
    """The tensor's signs times the mean of its absolute values, which is rounded to float32."""
    scale = float(tensor.abs().mean().float())
    return torch.where(tensor >= 0, scale, -scale).to(tensor)


def _dense(cell: Cell, given: Given, case: str, round_: int) -> Tensor:
    """The mean of what all ranks put in, in float64."""
    return torch.stack(
        [given(cell, rank, case, round_).double() for rank in range(cell.replicas)]
    ).mean(0)


# -- broken twins ----------------------------------------------------------------------------------


def _dropped(compression: Any, flat: Tensor, topology: Topology) -> None:
    """Forgets what was left out."""
    compression.residual.zero_()


def _undivided(compression: Any, flat: Tensor, topology: Topology) -> None:
    """Forgets the division by N."""
    flat.mul_(topology.num_workers)


def _ties_for(compression: Any, flat: Tensor, topology: Topology) -> None:
    """Counts a tie as a vote for +1."""
    flat[flat == 0] = 1.0


def _sign_of_the_mean(compression: Any, flat: Tensor, topology: Topology) -> None:
    """Takes the sign of the mean, which is no vote."""
    topology.mean(flat)
    flat.sign_()


class _Smaller(ScaledSigns):
    """A codec whose scale is 0.3 of what it should be.

    What it has left over follows from what it sent.
    """

    def decode(self, wire: Tensor, out: Tensor) -> None:
        super().decode(wire, out)
        out.mul_(0.3)


class _SmallerScale(ScaledSign):
    """The compression with that codec."""

    def codec(
        self, pieces: Sequence[int], dtype: torch.dtype, *, feedback: bool = True
    ) -> ScaledSigns:
        return _Smaller(pieces, dtype, feedback=feedback)


class _OneScale(ScaledSign):
    """The compression with one scale for all tensors."""

    def codec(
        self, pieces: Sequence[int], dtype: torch.dtype, *, feedback: bool = True
    ) -> ScaledSigns:
        return super().codec([sum(pieces)], dtype, feedback=feedback)


CELLS = compression.CELLS
LAWS = (
    Law(
        "means and what is left over are the mean of what was given",
        feedback,
        is_of("topk", "ef_sign", "powersgd", precision="fp64"),
        (
            control(
                feedback, "what is left over is dropped", "topk", "native", mean=after(_dropped)
            ),
            control(
                feedback, "what is left over is dropped", "ef_sign", "native", mean=after(_dropped)
            ),
            control(
                feedback, "what is left over is dropped", "powersgd", "ring", mean=after(_dropped)
            ),
            control(
                feedback, "the divide by N is missing", "powersgd", "ring", mean=after(_undivided)
            ),
        ),
    ),
    Law(
        "top-k with k = P is the dense mean",
        all_elements,
        is_of("topk", precision="fp64"),
        (control(all_elements, "one element in ten stays", "topk", "native", rho=0.9),),
    ),
    Law(
        "powersgd of full rank is the dense mean",
        full_rank,
        is_of("powersgd", precision="fp64"),
        (control(full_rank, "one column too few", "powersgd", "ring", rank=8),),
    ),
    Law(
        "powersgd is the dense mean where that has its rank",
        rank_of_the_mean,
        is_of("powersgd", precision="fp64"),
        (control(rank_of_the_mean, "one column too few", "powersgd", "ring", rank=1),),
    ),
    Law(
        "ef_sign's mean is that of the signs times mean|e + g| of each tensor",
        is_scaled_signs,
        is_of("ef_sign", precision="fp64"),
        (
            control(is_scaled_signs, "0.3 of the scale", "ef_sign", "native", made=_SmallerScale),
            control(
                is_scaled_signs, "one scale for all tensors", "ef_sign", "native", made=_OneScale
            ),
        ),
    ),
    Law(
        "half precision is off by N + 1 roundings at most",
        within_roundings,
        is_of("fp16", "bf16", precision="fp64"),
        (
            control(
                within_roundings,
                "the divide by N is missing",
                "fp16",
                "ring",
                mean=after(_undivided),
            ),
            control(
                within_roundings, "one element is not reduced", "bf16", "native", mean=own_last
            ),
        ),
    ),
    Law(
        "8 bits are off by half a step per hop at most",
        within_two_hops,
        lambda cell: is_of("int8")(cell) and cell.topology == "direct",
        (
            control(within_two_hops, "one element is not reduced", "int8", "direct", mean=own_last),
            control(within_two_hops, "judged as 9 bits", "int8", "direct", bits=9),
        ),
    ),
    Law(
        "the vote is the majority's, a tie is 0",
        is_the_majority,
        is_of("sign"),
        (
            control(is_the_majority, "a tie counts as +1", "sign", "native", mean=after(_ties_for)),
            control(
                is_the_majority, "the sign of the mean", "sign", "native", mean=_sign_of_the_mean
            ),
        ),
    ),
)
