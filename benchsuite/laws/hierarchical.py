"""Laws of a mean in two levels: over several hosts it is the same mean, with the bytes of theory.

The ranks are put on two hosts, in blocks and in turns; an odd number makes one host larger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchsuite.comm import Comm, Traffic
from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases, twins
from benchsuite.laws.harness.runs import count_different
from benchsuite.laws.topology import (
    counted_is_predicted,
    integer_mean,
    same_bits_everywhere,
    vector,
)
from benchsuite.plan.cell import Cell, resolve
from benchsuite.topology import Topology
from benchsuite.topology.hierarchical import ranks_by_host
from benchsuite.worker import setup
from benchsuite.worker.traffic_mode import derived_total

NUMEL = 9240  # divisible by 2 to 8 and by 10, 11 and 12
PARTS = ((0, NUMEL), (0, 1001), (1001, NUMEL))  # the whole vector, then the same as two buckets


def placements(num_ranks: int) -> list[list[int]]:
    """The hosts of the ranks, in two ways.

    Three ranks are placed as 2 + 1, and as first and last + middle; four as 2 + 2, and in turns.
    """
    blocks = [rank * 2 // num_ranks for rank in range(num_ranks)]
    turns = [rank % 2 for rank in range(num_ranks)]
    return [blocks] if blocks == turns else [blocks, turns]


def placed(make_ranks: MakeRanks, hosts: Sequence[int]) -> MakeRanks:
    """The same ranks on these hosts."""

    def call(size: int, body: Callable[[Any], Any], *, strict: str = "") -> list[Any]:
        def there(comm: Any) -> Any:
            comm.hosts = list(hosts)
            return body(comm)

        return make_ranks(size, there, strict=strict)

    return call


def on_hosts(
    make_ranks: MakeRanks, cell: Cell, *, law: Callable[..., Figure], mean: twins.Mean | None = None
) -> Figure:
    """A law of a mean on every placement; the answer is the worst of its figures."""
    figures = [
        (hosts, law(placed(make_ranks, hosts), resolve(cell), mean=mean))
        for hosts in placements(cell.replicas)
    ]
    hosts, worst = max(figures, key=lambda pair: pair[1].value)
    return Figure(worst.value, worst.bound, f"hosts {hosts}: {worst.detail}")


def crosses_as_theory_says(make_ranks: MakeRanks, cell: Cell, *, topology: str = "") -> Figure:
    """One mean sends 2 (H-1) M between H hosts, and nothing else leaves them.

    The memory of a host of n ranks carries 2 (n-1) M + (n-1)/n M. `topology` puts another one over
    the same hosts. Bound: exact. The twin is a flat ring.
    """

    def body(comm: Comm) -> tuple[Traffic, Traffic]:
        made: Topology = (
            setup.make("topology", topology, {}) if topology else setup.make_topology(cell)
        )
        made.start(comm)
        made.mean(torch.zeros(NUMEL))
        return comm.traffic, derived_total(getattr(comm, "calls", {}))

    gap = 0
    where = ""
    for hosts in placements(cell.replicas):
        per_rank = placed(make_ranks, hosts)(cell.replicas, body)
        whole = sum((counted + derived for counted, derived in per_rank), Traffic())
        across = sum(count for (a, b), count in whole.payload.items() if hosts[a] != hosts[b])
        groups = ranks_by_host(hosts)
        num_bytes = 4 * NUMEL
        shared = sum(
            2 * (len(g) - 1) * num_bytes + (len(g) - 1) * num_bytes // len(g) for g in groups
        )
        told = 2 * (len(groups) - 1) * num_bytes, 0, shared
        found = across, whole.payload_bytes - across, whole.shm_bytes
        difference = sum(abs(a - b) for a, b in zip(found, told, strict=True))
        if difference > gap:
            gap = difference
            where = (
                f"hosts {hosts}: (across, on a wire inside, in memory) {found} bytes, theory {told}"
            )
    return Figure(gap, 0, f"{where or 'as theory says'}, {cell.label}")


def lives_there_or_is_copied(
    make_ranks: MakeRanks, cell: Cell, *, mean: twins.Mean | None = None
) -> Figure:
    """A vector in the topology's own memory gets the bits that any other vector gets.

    So do slices of it. Bound: exact. The twins leave one element unreduced, or round once more.
    """

    def body(comm: Comm) -> int:
        made: Topology = setup.make_topology(cell)
        made.start(comm)
        own = made.buffer(NUMEL, torch.zeros(1))
        other = torch.zeros(NUMEL)
        there = made if mean is None else twins.OtherMean(made, mean)
        different = 0
        for round_, (start, stop) in enumerate(PARTS):
            for flat in (own, other):
                flat.copy_(vector(comm.rank, NUMEL, round_, integers=False))
            untouched = own.clone()
            there.mean(own[start:stop])
            made.mean(other[start:stop])
            different += count_different(own, other)
            outside: Tensor = torch.cat(
                [own[:start] - untouched[:start], own[stop:] - untouched[stop:]]
            )
            different += int(outside.count_nonzero())
        return different

    cell = resolve(cell)
    wrong = {
        str(hosts): sum(placed(make_ranks, hosts)(cell.replicas, body))
        for hosts in [[0] * cell.replicas, *placements(cell.replicas)]
    }
    return Figure(
        sum(wrong.values()),
        0,
        f"elements that differ, by hosts of the ranks: {wrong}, {cell.label}",
    )


def _applies(cell: Cell) -> bool:
    """Whether the cell is a mean in two levels."""
    return cell.topology == "hierarchical" and cell.replicas > 1


_ON = {"topology": "hierarchical", "replicas": 3}


def _everywhere(name: str, law: Callable[..., Figure], mean: twins.Mean, broken: str) -> Law:
    """A law of means that is shown on every placement, with its twin."""
    control = Control(broken, partial(on_hosts, law=law, mean=mean), _ON)
    return Law(f"{name}, over two hosts", partial(on_hosts, law=law), _applies, (control,))


CELLS = cases.MEANS
LAWS = (
    _everywhere(
        "integer vectors are averaged exactly",
        integer_mean,
        twins.sum_only,
        "the divide by N is missing",
    ),
    _everywhere(
        "a mean has the same bits on all ranks",
        same_bits_everywhere,
        twins.chunk_skipped,
        "one element is not reduced",
    ),
    _everywhere(
        "counted traffic of a mean is the predicted",
        counted_is_predicted,
        twins.twice,
        "synchronises twice",
    ),
    Law(
        "hosts exchange 2 (H-1) M in all",
        crosses_as_theory_says,
        _applies,
        (
            Control(
                "a flat ring over the same hosts",
                partial(crosses_as_theory_says, topology="ring"),
                {"topology": "hierarchical", "replicas": 4},
            ),
        ),
    ),
    Law(
        "a vector in the topology's memory gets the bits of any other",
        lives_there_or_is_copied,
        _applies,
        (
            Control(
                "one element is not reduced",
                partial(lives_there_or_is_copied, mean=twins.chunk_skipped),
                _ON,
            ),
            Control("rounds once more", partial(lives_there_or_is_copied, mean=twins.detour), _ON),
        ),
    ),
)
