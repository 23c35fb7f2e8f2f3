"""Laws of collective topologies: there is one mean, whatever the size, with predicted traffic.

Parameter servers have laws of their own. A size smaller than the number of ranks leaves chunks
empty; sizes just above a segment make chunks of unequal numbers of segments. Each vector is reduced
twice, because plans are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchsuite.comm import Comm, Traffic
from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases, twins
from benchsuite.laws.harness.runs import count_different, option, place
from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell, resolve
from benchsuite.topology import Topology, bounds
from benchsuite.worker import setup
from benchsuite.worker.traffic_mode import derived_total

ROUNDS = 2


def sizes(num_ranks: int, longest: int) -> list[int]:
    """One element, fewer than ranks, odd, and one with a first chunk that is a segment longer."""
    return [
        1,
        max(1, num_ranks - 1),
        num_ranks,
        1001,
        longest * num_ranks + 1,
        3 * longest * num_ranks + 7,
    ]


def vector(rank: int, numel: int, round_: int, *, integers: bool) -> Tensor:
    """What a rank puts in: float32, other numbers for every rank, size and round."""
    generator = torch.Generator().manual_seed(10_000 * numel + 100 * rank + round_)
    if integers:
        return torch.randint(-1000, 1001, (numel,), generator=generator).float()
    return torch.randn(numel, generator=generator)


def means(
    comm: Comm, *, cell: Cell, integers: bool, mean: twins.Mean | None = None
) -> tuple[dict[tuple[int, int], Tensor], Traffic, Traffic]:
    """The body of a rank: takes all means.

    Returns (size, round) -> its mean, the counted traffic with what is derived of the library, and
    the traffic that is predicted for all.
    """
    place(comm, cell)
    topology: Topology = setup.make_topology(cell)
    topology.start(comm)
    if mean is not None:
        topology = twins.OtherMean(topology, mean)
    results = {}
    predicted = Traffic()
    for numel in sizes(comm.size, longest(cell)):
        flat = torch.empty(numel)
        for round_ in range(ROUNDS):
            flat.copy_(vector(comm.rank, numel, round_, integers=integers))
            topology.mean(flat)
            results[numel, round_] = flat.clone()
            predicted += topology.predicted_traffic(
                numel, flat.element_size(), num_workers=comm.size
            )
    return results, comm.traffic + derived_total(getattr(comm, "calls", {})), predicted


def longest(cell: Cell) -> int:
    """The elements of the longest message where the topology cuts its vectors, else some number."""
    kib = option(cell, plugins.stem(cell.topology), "segment_kib")
    return min(int(kib) * 256 if kib else 256, 4096)


def integer_mean(
    make_ranks: MakeRanks, cell: Cell, *, mean: twins.Mean | None = None, strict: str = ""
) -> Figure:
    """Of integer float32 vectors every rank gets the bits of sum / N.

    Bound: exact. In the twin the division by N is missing.
    """
    cell = resolve(cell)
    body = partial(means, cell=cell, integers=True, mean=mean)
    different = 0
    for results, _, _ in make_ranks(cell.replicas, body, strict=strict):
        for (numel, round_), result in results.items():
            total = torch.zeros(numel)
            for rank in range(cell.replicas):
                total += vector(rank, numel, round_, integers=True)
            different += count_different(result, total / cell.replicas)
    return Figure(different, 0, f"{different} elements differ from sum / N, {cell.label}")


def same_bits_everywhere(
    make_ranks: MakeRanks, cell: Cell, *, mean: twins.Mean | None = None, strict: str = ""
) -> Figure:
    """The mean of any vectors has the same bits on all ranks.

    Bound: exact. In the twins nothing is synchronised, or one element is not reduced.
    """
    cell = resolve(cell)
    per_rank = make_ranks(
        cell.replicas, partial(means, cell=cell, integers=False, mean=mean), strict=strict
    )
    first = per_rank[0][0]
    different = sum(
        count_different(result, first[key])
        for results, _, _ in per_rank[1:]
        for key, result in results.items()
    )
    return Figure(different, 0, f"{different} elements differ from rank 0's, {cell.label}")


def ring_order(
    make_ranks: MakeRanks, cell: Cell, *, mean: twins.Mean | None = None, strict: str = ""
) -> Figure:
    """The ring's result is, bit for bit, the serial sum in the ring's own order.

    Chunk c starts at rank c. Bound: exact. The twins add in the order of ranks.
    """
    cell = resolve(cell)
    different = 0
    for results, _, _ in make_ranks(
        cell.replicas, partial(means, cell=cell, integers=False, mean=mean), strict=strict
    ):
        for (numel, round_), result in results.items():
            different += count_different(result, _serial_ring(numel, round_, cell.replicas))
    return Figure(different, 0, f"{different} elements differ from the serial replay, {cell.label}")


def _serial_ring(numel: int, round_: int, num_ranks: int) -> Tensor:
    """The mean, added serially in the order of the ring."""
    rows = [vector(rank, numel, round_, integers=False) for rank in range(num_ranks)]
    chunks = []
    for chunk, (start, stop) in enumerate(bounds(numel, num_ranks)):
        partial_sum = rows[chunk][start:stop].clone()
        for step in range(1, num_ranks):
            partial_sum += rows[(chunk + step) % num_ranks][start:stop]
        chunks.append(partial_sum / num_ranks)
    return torch.cat(chunks)


def in_rank_order(
    make_ranks: MakeRanks, cell: Cell, *, mean: twins.Mean | None = None, strict: str = ""
) -> Figure:
    """The mean is, bit for bit, rank 0's vector plus rank 1's and so on, divided once.

    Bound: exact. The twin adds around a ring.
    """
    cell = resolve(cell)
    different = 0
    for results, _, _ in make_ranks(
        cell.replicas, partial(means, cell=cell, integers=False, mean=mean), strict=strict
    ):
        for (numel, round_), result in results.items():
            total = vector(0, numel, round_, integers=False)
            for rank in range(1, cell.replicas):
                total += vector(rank, numel, round_, integers=False)
            different += count_different(result, total / cell.replicas)
    return Figure(
        different, 0, f"{different} elements differ from the serial sum in rank order, {cell.label}"
    )


def counted_is_predicted(
    make_ranks: MakeRanks, cell: Cell, *, mean: twins.Mean | None = None, strict: str = ""
) -> Figure:
    """Bytes and messages of the means, per (source, destination), are the predicted ones.

    Bound: exact. The twin synchronises twice.
    """
    cell = resolve(cell)
    per_rank = make_ranks(
        cell.replicas, partial(means, cell=cell, integers=False, mean=mean), strict=strict
    )
    counted = sum((traffic for _, traffic, _ in per_rank), Traffic())
    return compare(counted, per_rank[0][2], cell)


def compare(counted: Traffic, predicted: Traffic, cell: Cell) -> Figure:
    """(how many bytes and messages differ, the first edge that differs with both numbers)."""
    difference = 0
    where = ""
    for what in ("payload", "messages", "shm"):
        mine = getattr(counted, what)
        theirs = getattr(predicted, what)
        for edge in sorted(mine.keys() | theirs.keys()):
            gap = abs(mine.get(edge, 0) - theirs.get(edge, 0))
            if gap and not where:
                where = (
                    f"; {what} {edge}: {mine.get(edge, 0)} counted, {theirs.get(edge, 0)} predicted"
                )
            difference += gap
    total = f"{counted.payload_bytes} bytes counted, {predicted.payload_bytes} predicted"
    return Figure(difference, 0, f"{total}{where}, {cell.label}")


def is_collective(cell: Cell) -> bool:
    """Whether the topology reduces without servers; a gossip graph has no mean."""
    return cell.num_servers == 0 and hasattr(plugins.load("topology", cell.topology), "mean")


def is_counted(cell: Cell) -> bool:
    """Whether the suite's own sends are counted, where the library's are derived."""
    strategy = plugins.find("sync", cell.sync).constants.get("payload_source")
    return "derived" not in (strategy, setup.make_topology(cell).payload_source)


def _control(law: Callable[..., Figure], mean: twins.Mean, broken: str) -> Control:
    """A twin of a mean on a ring of three ranks."""
    return Control(broken, partial(law, mean=mean), {"topology": "ring", "replicas": 3})


def _several(cell: Cell) -> bool:
    """Whether several ranks reduce without servers."""
    return is_collective(cell) and cell.replicas > 1


CELLS = cases.MEANS
LAWS = (
    Law(
        "integer vectors are averaged exactly",
        integer_mean,
        is_collective,
        (
            _control(integer_mean, twins.sum_only, "the divide by N is missing"),
            _control(integer_mean, twins.divided_first, "divides before it adds"),
            _control(integer_mean, twins.chunk_skipped, "one element is not reduced"),
        ),
    ),
    Law(
        "a mean has the same bits on all ranks",
        same_bits_everywhere,
        _several,
        (
            _control(same_bits_everywhere, twins.silent, "nothing is synchronised"),
            _control(same_bits_everywhere, twins.chunk_skipped, "one element is not reduced"),
        ),
    ),
    Law(
        "the ring is the serial replay of its own addition order",
        ring_order,
        lambda cell: cell.topology == "ring",
        (
            _control(ring_order, twins.rank_order, "adds in rank order"),
            _control(ring_order, twins.chunk_skipped, "one element is not reduced"),
            Control(
                "adds in rank order, in NCCL's rounds",
                partial(ring_order, mean=twins.rank_order, strict="nccl"),
                {"topology": "ring", "replicas": 3},
            ),
        ),
    ),
    Law(
        "vectors are added in rank order",
        in_rank_order,
        lambda cell: cell.topology in ("direct", "hierarchical") and cell.hosts == 1,
        (Control("adds around a ring", in_rank_order, {"topology": "ring", "replicas": 3}),),
    ),
    Law(
        "counted traffic of a mean is the predicted",
        counted_is_predicted,
        lambda cell: _several(cell) and is_counted(cell),
        (_control(counted_is_predicted, twins.twice, "synchronises twice"),),
    ),
)
