"""Topologies beyond the laws of a mean: closed forms of costs, halves of `direct`, gossip graphs,
ports."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from benchsuite.comm import Traffic
from benchsuite.laws import Law
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.laws.harness.virtual_ranks import virtual_ranks
from benchsuite.plan import placement, plugins
from benchsuite.plan.cell import Cell
from benchsuite.topology.direct import Topology as Direct
from benchsuite.topology.random_matching import Topology as RandomMatching
from tests.law_cells import cases, tiny

WORLDS = {
    "gloo": thread_ranks,
    "nccl's rounds": partial(thread_ranks, strict="nccl"),
    "virtual": virtual_ranks,
    "virtual rounds": partial(virtual_ranks, strict="nccl"),
}
GRAPHS = [
    tiny(sync="gossip", topology=topology, replicas=n)
    for topology in plugins.names("topology")
    for n in range(2, 9)
    if not (topology == "random_matching" and n % 2)
]

COSTS = [
    tiny(topology=topology, replicas=n, clock="virtual")
    for topology in ("native", "ring", "halving_doubling", "tree", "direct")
    for n in (2, 3, 4, 5, 7, 8, 16)
]
SERVED = [
    tiny(
        topology="parameter_server",
        replicas=n,
        servers=s,
        server_placement=placement,
        clock="virtual",
    )
    for placement in ("own_host", "with_worker")
    for n in (1, 2, 4, 8)
    for s in sorted({1, 2, n})
    if s <= n or placement == "own_host"
]

# -- costs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("law", "cell"), list(cases("costs", [*COSTS, *SERVED])))
def test_costs(law: Law, cell: Cell) -> None:
    figure = law.check(virtual_ranks, cell)
    assert figure.holds, f"{law.name}: {figure}"


# -- graphs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("law", "cell"), list(cases("graphs", GRAPHS)))
def test_graphs(law: Law, cell: Cell) -> None:
    figure = law.check(thread_ranks, cell)
    assert figure.holds, f"{law.name}: {figure}"


def test_one_worker_mixes_with_nobody() -> None:
    for topology in ("ring_neighbours", "exponential"):
        graph = plugins.load("topology", topology)()
        (told,) = virtual_ranks(
            1,
            lambda comm, graph=graph: (
                graph.start(comm),
                graph.neighbours(3),
                graph.listeners(3),
            )[1:],
        )
        assert told == ([], []) and graph.edges(3, 1) == [], topology


def test_two_neighbours_in_a_ring_are_one_of_weight_a_half() -> None:
    graph = plugins.load("topology", "ring_neighbours")
    told = virtual_ranks(2, lambda comm: (made := graph(), made.start(comm), made.neighbours(0))[2])
    assert told == [[(1, 0.5)], [(0, 0.5)]]


def test_pairs_change_with_the_step_and_the_seed() -> None:
    steps = [RandomMatching().edges(step, 8) for step in range(10)]
    assert len({tuple(edges) for edges in steps}) > 5
    assert steps != [RandomMatching(seed=1).edges(step, 8) for step in range(10)]
    assert steps == [RandomMatching(seed=0).edges(step, 8) for step in range(10)]


# -- direct ----------------------------------------------------------------------------------------


def _halves(comm: Any) -> int:
    """What is wrong after a scatter and a gather of bytes of unequal lengths, one of them empty."""
    topology = Direct()
    topology.start(comm)
    pieces = [
        torch.full((rank,), 10 * comm.rank + rank, dtype=torch.uint8) for rank in range(comm.size)
    ]
    rows = topology.scatter(pieces)
    wrong = sum(
        row.tolist() != [10 * rank + comm.rank] * comm.rank for rank, row in enumerate(rows)
    )
    wire = torch.full((comm.rank,), comm.rank, dtype=torch.uint8)
    wrong += sum(
        row.tolist() != [rank] * rank
        for rank, row in enumerate(topology.gather(wire, sizes=range(comm.size)))
    )
    wrong += sum(
        row.tolist() != [rank] * 3
        for rank, row in enumerate(topology.gather(torch.full((3,), comm.rank, dtype=torch.uint8)))
    )
    told = topology.predicted_scatter(range(comm.size)) + topology.predicted_gather(
        3, num_workers=comm.size
    )
    told += topology.predicted_gather(range(comm.size), num_workers=comm.size)
    mine = {edge: count for edge, count in told.payload.items() if edge[0] == comm.rank}
    return wrong + (comm.traffic.payload != mine)


@pytest.mark.parametrize("ranks", WORLDS.values(), ids=WORLDS)
def test_scatter_and_gather_bring_every_piece_to_its_rank(ranks: Any) -> None:
    for size in (1, 2, 3, 4, 7):
        assert ranks(size, _halves) == [0] * size, size


# -- ports -----------------------------------------------------------------------------------------


def test_servers_beside_workers_share_their_ports_and_hosts() -> None:
    fields: dict[str, Any] = {
        "topology": "parameter_server",
        "replicas": 4,
        "servers": 2,
        "clock": "virtual",
    }
    beside = tiny(**fields, server_placement="with_worker")
    assert placement.ports(tiny(**fields)) == [0, 1, 2, 3, 4, 5] and placement.ports(beside) == [
        0,
        1,
        2,
        3,
        0,
        1,
    ]
    assert placement.hosts(beside) == [0] * 6
    two = tiny(**fields, server_placement="with_worker", hosts=2)
    assert placement.hosts(two) == placement.ports(two) == [0, 0, 1, 1, 0, 0]
    assert placement.hosts(tiny(**fields, hosts=2)) == [0, 0, 0, 1, 1, 1]


def test_what_stays_behind_a_port_is_not_counted_there() -> None:
    traffic = Traffic()
    for edge, num_bytes in (((0, 1), 5), ((0, 2), 7), ((1, 2), 11), ((2, 0), 1)):
        traffic.add(*edge, num_bytes)
    assert traffic.busiest_port_bytes == 18  # into rank 2
    assert traffic.busiest_port([0, 0, 1]) == 18 and traffic.busiest_port([0, 1, 1]) == 12
