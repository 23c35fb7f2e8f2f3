"""Laws of compressed means: the same on all ranks, with the bytes that were told before.

What a compression loses is the subject of `compression_loss.py`. Each compression is shown on each
topology that it goes with, on vectors of tensors of odd sizes and on one of fewer elements than
ranks. Several means are taken in a row, because residuals and factors are kept between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchsuite import rules
from benchsuite.comm import Comm, Traffic
from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.codecs import SHAPES, vector
from benchsuite.laws.harness.cases import Asked, Cells, subject_of, tiny
from benchsuite.laws.harness.runs import Change, count_different, run
from benchsuite.laws.topology import compare, is_collective
from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell, resolve
from benchsuite.topology import Topology
from benchsuite.worker import setup
from benchsuite.worker.setup import Training
from benchsuite.worker.traffic_mode import derived_total
from benchsuite.workload import Shapes, numel

CASES: Mapping[str, Shapes] = {"odd": SHAPES, "one element": {"a": torch.Size([1])}}
ROUNDS = 4
# (cell, rank, case, round) -> the vector that the rank puts in
Given = Callable[[Cell, int, str, int], Tensor]
# Takes the mean of a vector in place, over (compression, vector, topology).
Mean = Callable[[Any, Tensor, Topology], None]


@dataclass(frozen=True)
class Means:
    """What one rank found, by (case, round); `left` is what it has not sent at the end, by case."""

    results: dict[tuple[str, int], Tensor]
    left: dict[str, Tensor | None]
    traffic: Traffic
    predicted: Traffic


def random_vectors(cell: Cell, rank: int, case: str, round_: int) -> Tensor:
    """Random vectors, others for every rank and round."""
    return vector(1000 * round_ + rank, numel(CASES[case]), setup.DTYPES[cell.precision])


def means(
    make_ranks: MakeRanks,
    cell: Cell,
    *,
    given: Given | None = None,
    mean: Mean | None = None,
    made: Callable[[], Any] | None = None,
) -> list[Means]:
    """All ranks' compressed means.

    `mean`, where given, takes the mean instead; `made` is the compression in the place of the
    cell's.
    """
    return make_ranks(
        cell.replicas, partial(one_rank, cell=cell, given=given, mean=mean, made=made)
    )


def one_rank(
    comm: Comm,
    *,
    cell: Cell,
    given: Given | None,
    mean: Mean | None,
    made: Callable[[], Any] | None,
) -> Means:
    """The body of a rank: takes the means and notes what it sent."""
    topology: Topology = setup.make_topology(cell)
    topology.start(comm)
    results = {}
    left = {}
    predicted = Traffic()
    for case, shapes in CASES.items():
        options = setup.options_for(cell, "compression")
        compression = (
            made() if made is not None else setup.make("compression", cell.compression, options)
        )
        compression.start(shapes, seed=cell.seed)
        for round_ in range(ROUNDS):
            flat = (given or random_vectors)(cell, comm.rank, case, round_)
            if mean is None:
                compression.mean(flat, topology)
            else:
                mean(compression, flat, topology)
            results[case, round_] = flat.clone()
            itemsize = flat.element_size()
            predicted += compression.predicted_traffic(
                shapes, itemsize, topology, num_workers=comm.size
            )
        left[case] = getattr(compression, "residual", None)
    traffic = comm.traffic + derived_total(getattr(comm, "calls", {}))
    comm.barrier()  # a twin that sends nothing must not be gone before others have connected
    return Means(results, left, traffic, predicted)


def same_bits_everywhere(make_ranks: MakeRanks, cell: Cell, *, mean: Mean | None = None) -> Figure:
    """A compressed mean has the same bits on all ranks.

    Bound: exact. The twins synchronise nothing, or leave one element unreduced.
    """
    ranks = means(make_ranks, resolve(cell), mean=mean)
    different = sum(
        count_different(result, ranks[0].results[key])
        for rank in ranks[1:]
        for key, result in rank.results.items()
    )
    return Figure(different, 0, f"{different} elements differ from rank 0's, {cell.label}")


def counted_is_predicted(make_ranks: MakeRanks, cell: Cell, *, mean: Mean | None = None) -> Figure:
    """Bytes and messages of compressed means are the predicted ones.

    What the library sends is derived from its calls. Bound: exact. The twins synchronise or gather
    twice.
    """
    ranks = means(make_ranks, resolve(cell), mean=mean)
    return compare(sum((rank.traffic for rank in ranks), Traffic()), ranks[0].predicted, cell)


def stays_not_finite(make_ranks: MakeRanks, cell: Cell, *, mean: Mean | None = None) -> Figure:
    """One NaN in one rank's vector makes every rank's mean not finite, and raises nothing.

    Bound: exact. The twin puts a number in its place.
    """

    def given(cell: Cell, rank: int, case: str, round_: int) -> Tensor:
        flat = random_vectors(cell, rank, case, round_)
        if rank == cell.replicas - 1:
            flat[len(flat) // 2] = float("nan")
        return flat

    ranks = means(make_ranks, resolve(cell), given=given, mean=mean)
    finite = sum(
        bool(torch.isfinite(result).all()) for rank in ranks for result in rank.results.values()
    )
    return Figure(
        finite, 0, f"{finite} of {len(ranks) * ROUNDS * len(CASES)} means are finite, {cell.label}"
    )


def server_is_gather(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """Training over one server gives the bits of training by all-gather.

    A vote gives them over several servers too. Bound: exact. In the twins the server does not count
    the votes, or halves what comes.
    """
    different = 0
    votes = plugins.stem(cell.compression) == "sign"
    for servers in (1, cell.replicas) if votes else (1,):
        served = dataclasses.replace(cell, topology="parameter_server", servers=servers)
        ours = run(make_ranks, cell)
        theirs = run(make_ranks, served, change=change)
        different += sum(
            count_different(mine, other)
            for one, two in zip(ours.workers, theirs.workers, strict=True)
            for mine, other in zip(one.params, two.params, strict=True)
        )
    return Figure(
        different, 0, f"{different} elements differ between server and all-gather, {cell.label}"
    )


# -- broken twins ----------------------------------------------------------------------------------


def after(change: Callable[[Any, Tensor, Topology], None]) -> Mean:
    """The right mean, and then something done to it."""

    def mean(compression: Any, flat: Tensor, topology: Topology) -> None:
        compression.mean(flat, topology)
        change(compression, flat, topology)

    return mean


def silent(compression: Any, flat: Tensor, topology: Topology) -> None:
    """Does not synchronise."""


def own_last(compression: Any, flat: Tensor, topology: Topology) -> None:
    """Leaves this rank's own value in one element."""
    mine = flat[-1:].clone()
    compression.mean(flat, topology)
    flat[-1:] = mine


def _twice(compression: Any, flat: Tensor, topology: Topology) -> None:
    """Takes the mean twice where once is enough."""
    compression.mean(flat.clone(), topology)
    compression.mean(flat, topology)


def _masked(compression: Any, flat: Tensor, topology: Topology) -> None:
    """Puts a number where there was none."""
    flat.nan_to_num_()


def _no_vote(training: Training) -> Training:
    """The change with a server that applies the mean of the votes, not the majority."""
    training.topology.settle = lambda mean: None  # type: ignore[attr-defined]
    return training


def _own_scale(training: Training) -> Training:
    """The change with a server that halves what it decodes."""
    training.topology.settle = lambda mean: mean.mul_(0.5)  # type: ignore[attr-defined]
    return training


# -- the laws --------------------------------------------------------------------------------------


def _cells(asked: Asked) -> list[Cell]:
    """Every compression on every topology that has a mean of its own."""
    return (
        []
        if asked.sync
        else [cell for cell in _all(asked) if is_collective(cell) and not rules.validate(cell)]
    )


def _all(asked: Asked) -> Iterator[Cell]:
    """All cells of the compressions and topologies that are asked for."""
    for compression in asked.members("compression"):
        for topology in asked.members("topology"):
            for replicas in asked.workers if compression != "none" else ():
                fields: dict[str, Any] = {
                    "compression": compression,
                    "topology": topology,
                    "clock": asked.clock,
                }
                yield tiny(**fields, replicas=replicas)
                if replicas == 3:
                    yield tiny(**fields, replicas=replicas, precision="fp32")


def is_of(*names: str, least: int = 1, precision: str = "") -> Callable[[Cell], bool]:
    """Whether a cell has one of these compressions and at least so many workers."""

    def applies(cell: Cell) -> bool:
        fits = not precision or cell.precision == precision
        return plugins.stem(cell.compression) in names and cell.replicas >= least and fits

    return applies


def control(
    law: Callable[..., Figure],
    broken: str,
    compression: str,
    topology: str,
    replicas: int = 2,
    **how: Any,
) -> Control:
    """A broken twin of a mean."""
    on = {"compression": compression, "topology": topology, "replicas": replicas}
    return Control(broken, partial(law, **how), on)


_GATHERED = ("topk", "sign", "ef_sign")
CELLS = Cells(_cells, lambda cell: f"a mean over {subject_of(cell).partition(' ')[2]}")
LAWS = (
    Law(
        "a compressed mean has the same bits on all ranks",
        same_bits_everywhere,
        lambda cell: cell.replicas > 1,
        (
            control(same_bits_everywhere, "nothing is synchronised", "fp16", "ring", mean=silent),
            control(
                same_bits_everywhere, "one element is not reduced", "topk", "native", mean=own_last
            ),
            control(
                same_bits_everywhere, "one element is not reduced", "int8", "direct", mean=own_last
            ),
        ),
    ),
    Law(
        "counted traffic of a compressed mean is the predicted",
        counted_is_predicted,
        lambda cell: True,
        (
            control(counted_is_predicted, "synchronises twice", "powersgd", "ring", mean=_twice),
            control(counted_is_predicted, "gathers twice", "topk", "native", mean=_twice),
        ),
    ),
    Law(
        "a mean of what is not finite is not finite anywhere",
        stays_not_finite,
        is_of("fp16", "bf16", "topk", "ef_sign", "int8", "powersgd"),
        (
            control(
                stays_not_finite,
                "a number is put in its place",
                "fp16",
                "ring",
                mean=after(_masked),
            ),
        ),
    ),
    Law(
        "a server gives the bits of an all-gather",
        server_is_gather,
        lambda cell: is_of(*_GATHERED, precision="fp64")(cell) and cell.topology == "native",
        (
            control(
                server_is_gather,
                "the server does not count the votes",
                "sign",
                "native",
                3,
                change=_no_vote,
            ),
            control(
                server_is_gather,
                "the server halves what comes",
                "topk",
                "native",
                change=_own_scale,
            ),
        ),
        own_run=True,
    ),
)
