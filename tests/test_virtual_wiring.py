"""Every field of a cell reaches its simulation: seconds by hand, through `simulate`, for each of
them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchsuite.analysis import costs
from benchsuite.analysis.fits import Link
from benchsuite.laws.harness.virtual_ranks import virtual_ranks
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.results.assemble.virtual import busy_share, sections, thinned
from benchsuite.virtual.clock import VirtualClock
from benchsuite.virtual.comm import VirtualComm
from benchsuite.virtual.network import Network
from benchsuite.virtual.world import simulate
from tests.bench import TINY
from tests.test_virtual_network import posted

VECTOR = 4 * 585  # bytes of the tiny workload's parameters
# 100 ns per byte
MBIT = 80.0
BETA = 100e-9
ALPHA = 0.005
M = VECTOR * BETA
COMPUTE = 0.01
FIXED = {"kind": "fixed", "mean_s": COMPUTE}
SERVER = {"topology": "parameter_server"}
CANCEL = {"options": {"k_sync": {"backup_workers": 1, "late": "cancel"}}}


def measured(**fields: Any) -> tuple[float, dict[str, Any]]:
    """(seconds from the start to the last worker's end, `cost`) of a timed cell, gradients left
    out."""
    fields = {"compute_time": FIXED, "gradients": "none", "budget": Budget(steps=1), **fields}
    made = resolve(Cell(workload=TINY, clock="virtual", **fields))
    records = simulate(made, "unused").records
    begin = min(record["start_ns"] for record in records)
    end = max(record["end_ns"] for record in records if record["role"] == "worker")
    return (end - begin) / 1e9, sections(made, records, {})[1]


SLOW = {"link_mbit": MBIT, "link_latency_us": ALPHA * 1e6}
LINE = {"compute_time": {"kind": "fixed", "overhead_s": 0.001, "per_sample_s": 0.0005}}


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"topology": "native", "replicas": 3}, COMPUTE),
        ({"topology": "native", "replicas": 3, "straggler": {1: 3.0}}, 3 * COMPUTE),
        ({"topology": "native", "replicas": 4, **LINE}, 0.001 + 0.0005 * 24 / 4),
        (
            {"topology": "native", "replicas": 4, **LINE, "batch_mode": "fixed_per_worker"},
            0.001 + 0.0005 * 24,
        ),
        ({**SERVER, **SLOW}, COMPUTE + 2 * (ALPHA + M)),
        ({**SERVER, "sync": "asynchronous", **SLOW}, COMPUTE + 2 * (ALPHA + M)),
        # the server's copy of each of two pushes, the last worker's copy of its answer
        ({**SERVER, "receive_cost": {"copy_s_per_gib": 100.0}}, COMPUTE + 2 * VECTOR * 100 / 2**30),
        # the second push queues behind the first at the server's port; answers leave one by one
        (
            {**SERVER, "replicas": 2, **SLOW, "receive_cost": {"incast": 2.0}},
            COMPUTE + 2 * ALPHA + (1 + 2 + 2) * M,
        ),
        ({"topology": "native", "replicas": 3, **SLOW}, COMPUTE + 4 * (ALPHA + M / 3)),
        # the first of two wins each time; the other gives up
        ({**SERVER, "sync": "k_sync", "replicas": 2, **CANCEL, "straggler": {1: 3.0}}, COMPUTE),
    ],
    ids=str,
)
def test_seconds_of_a_step_by_hand(fields: dict[str, Any], seconds: float) -> None:
    found, _ = measured(**fields)
    assert found == pytest.approx(seconds, abs=2e-9), f"{found:.9f} s, by hand {seconds:.9f} s"


@pytest.mark.parametrize("alpha", [0.0, 50e-6, 0.05])
@pytest.mark.parametrize(
    ("workers", "servers"),
    [(1, 1), (4, 1), (16, 1), (1, 2), (2, 2), (3, 2), (2, 4), (4, 4), (5, 4), (16, 4), (2, 8)],
)
def test_closed_forms_of_a_parameter_server_hold_for_any_workers_servers_and_latency(
    alpha: float, workers: int, servers: int
) -> None:
    def steps(count: int) -> float:
        return measured(
            **SERVER,
            replicas=workers,
            servers=servers,
            link_mbit=MBIT,
            link_latency_us=alpha * 1e6,
            compute_time={"kind": "fixed", "mean_s": 1e-9},
            batch_mode="fixed_per_worker",
            budget=Budget(steps=count),
        )[0]

    link = Link(alpha, BETA)
    size = {"num_workers": workers, "num_bytes": VECTOR, "num_servers": servers}
    first = steps(1)
    steady = (steps(11) - steps(6)) / 5
    for found, theory in (
        (first, costs.parameter_server_first_s(link, **size)),
        (steady, costs.parameter_server_s(link, **size)),
    ):
        assert abs(found / theory - 1) < 0.02, f"{found:.7f} s, theory {theory:.7f} s"


def test_who_gives_up_has_computed_until_then() -> None:
    _, cost = measured(
        **SERVER, sync="k_sync", replicas=2, **CANCEL, straggler={1: 3.0}, budget=Budget(steps=40)
    )
    assert cost["idle_share"] == pytest.approx(0.0, abs=1e-6)
    for rank in cost["ranks"][:2]:
        assert rank["compute_s"] == pytest.approx(rank["virtual_s"], rel=1e-6), rank


# -- what takes a port -----------------------------------------------------------------------------


def ended(size: int, body: Any, **more: Any) -> list[float]:
    """When each rank ends, in seconds."""
    return [
        now / 1e9
        for now in virtual_ranks(
            size, lambda comm: body(comm) or comm.now_ns(), **SLOW_LINK, **more
        )
    ]


SLOW_LINK = {"link_mbit": MBIT, "latency_us": ALPHA * 1e6}
NUMEL = 12_000
PIECE = 4 * NUMEL * BETA  # seconds of the whole vector on a port


@pytest.mark.parametrize(
    ("call", "seconds"),
    [
        (lambda comm, x: comm.all_reduce(x), 2 * 4 * (ALPHA + PIECE / 5)),
        (
            lambda comm, x: comm.reduce_scatter(torch.zeros(NUMEL // 5), x),
            2 * 4 * (ALPHA + PIECE / 5),
        ),
        (lambda comm, x: comm.all_gather(x, torch.zeros(NUMEL // 5)), 4 * (ALPHA + PIECE / 5)),
        (lambda comm, x: comm.broadcast(x, 2), 3 * (ALPHA + PIECE)),
        (lambda comm, x: comm.barrier(), 2 * 3 * ALPHA),
    ],
    ids=["all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier"],
)
def test_prices_of_the_librarys_collectives(call: Any, seconds: float) -> None:
    assert ended(5, lambda comm: call(comm, torch.zeros(NUMEL))) == pytest.approx(
        [seconds] * 5, abs=2e-9
    )


def test_a_collective_inside_a_host_is_free() -> None:
    made = resolve(
        Cell(
            workload=TINY,
            topology="native",
            replicas=4,
            hosts=2,
            clock="virtual",
            compute_time=FIXED,
            gradients="none",
            budget=Budget(steps=1),
            link_mbit=MBIT,
            link_latency_us=ALPHA * 1e6,
        )
    )
    between = (max(record["end_ns"] for record in simulate(made, "unused").records)) / 1e9
    assert between == pytest.approx(COMPUTE + 6 * (ALPHA + M / 4), abs=2e-9)
    network = Network(VirtualClock(), [0, 0, 1], link_mbit=MBIT, latency_us=ALPHA * 1e6)
    assert (
        network.collective("all_reduce", [0, 1], 10**6)
        == 0
        < network.collective("all_reduce", [1, 2], 10**6)
    )


def test_two_collectives_share_the_ports_and_so_do_a_message_and_a_collective() -> None:
    one = 2 * (ALPHA + PIECE / 2)

    def two(comm: VirtualComm) -> None:
        under_way = comm.lane(lambda lane: lane.all_reduce(torch.zeros(NUMEL)))
        comm.all_reduce(torch.zeros(NUMEL))
        under_way.wait()

    assert ended(2, two) == pytest.approx([2 * one] * 2, abs=2e-9)

    def behind_a_message(comm: VirtualComm) -> None:
        other = 1 - comm.rank
        sending = comm.isend(torch.zeros(NUMEL), other)
        comm.all_reduce(torch.zeros(NUMEL))
        comm.recv(torch.zeros(NUMEL), other)
        sending.wait()

    assert min(ended(2, behind_a_message)) >= PIECE + one


def test_a_message_after_a_collective_waits_for_the_port() -> None:
    def body(comm: VirtualComm) -> None:
        if comm.rank < 2:
            part = comm.split([0, 1])
            assert part is not None
            part.all_reduce(torch.zeros(NUMEL))
        else:
            comm.split([0, 1])
            comm.send(torch.zeros(NUMEL), 0)
        if comm.rank == 0:
            comm.recv(torch.zeros(NUMEL), 2)

    assert ended(3, body)[0] == pytest.approx(2 * (ALPHA + PIECE / 2) + PIECE, abs=2e-9)


def test_a_ticket_takes_the_latency() -> None:
    def body(comm: VirtualComm) -> None:
        if comm.rank == 0:
            comm.ticket(1, 7)
        else:
            assert comm.next_ticket()[:2] == (0, 7)

    assert ended(2, body) == [0.0, ALPHA]


def test_incast_is_for_who_finds_the_port_taken_not_for_who_comes_as_it_falls_free() -> None:
    released, there = posted([(0, 0, 2, 10_000), (1_000_000, 1, 2, 10_000)], incast=2.0)
    assert released == [1_000_000, 2_000_000] and there == [2_000_000, 3_000_000]


# -- what is left of a long run --------------------------------------------------------------------


def test_a_long_curve_is_of_means_of_groups() -> None:
    losses: list[float | None] = [float(k) for k in range(2500)]
    found = thinned(losses, list(range(16, 16 * 2501, 16)))
    assert found["loss"][:2] == [1.0, 4.0] and found["loss_samples"][:2] == [48, 96]
    assert (
        found["loss"][-1] == 2499.0
        and found["loss_samples"][-1] == 40_000
        and len(found["loss"]) == 834
    )
    losses[4] = None
    assert thinned(losses, list(range(2500)))["loss"][:3] == [1.0, None, 7.0]


def test_only_what_is_computed_inside_the_window_is_busy() -> None:
    def worker(start: list[int], compute: list[int]) -> dict[str, Any]:
        return {
            "start_ns": 0,
            "role": "worker",
            "steps": {"start_ns": start, "compute_ns": compute},
        }

    second = 10**9
    ranks: list[Any] = [
        worker([0, 4 * second], [4 * second, 4 * second]),
        worker([0], [2 * second]),
    ]
    assert busy_share(ranks, 1.0, 5.0) == pytest.approx((4 + 1) / 8)
    assert busy_share(ranks, 0.0, 8.0) == pytest.approx((8 + 2) / 16)
