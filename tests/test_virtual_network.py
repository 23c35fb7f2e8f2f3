"""Ports cost alpha + M beta where nobody is in the way, N M beta on a server's port.

The closed forms of the collectives are met within 2 %.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchsuite.laws.harness.virtual_ranks import virtual_ranks
from benchsuite.plan.cell import Budget, Cell, resolve
from benchsuite.topology.ring import Topology as Ring
from benchsuite.virtual.clock import VirtualClock
from benchsuite.virtual.comm import VirtualComm
from benchsuite.virtual.network import Network
from tests.virtual_runs import run

MBIT = 80.0  # 10 MB/s: 100 ns per byte
BETA = 100e-9
ALPHA = 0.001
LAN = 50e-6


class Parcel:
    def __init__(self) -> None:
        self.at = -1

    def arrives(self, at: int) -> None:
        self.at = at


def posted(sends: list[tuple[int, int, int, int]], **network: Any) -> tuple[list[int], list[int]]:
    """(time, source, destination, bytes) -> (when released, when there) of each."""
    clock = VirtualClock()
    net = Network(clock, range(4), link_mbit=MBIT, latency_us=ALPHA * 1e6, **network)
    released = []
    parcels = [Parcel() for _ in sends]

    def life() -> None:
        for (at, source, destination, size), parcel in zip(sends, parcels, strict=True):
            clock.wait_until(at)
            released.append(net.post(parcel, source, destination, size))
        clock.wait_until(10**12)

    clock.spawn(0, life)
    clock.run()
    return released, [parcel.at for parcel in parcels]


def test_a_message_takes_latency_and_bytes_over_rate_once() -> None:
    assert posted([(0, 0, 1, 10_000)]) == ([1_000_000], [2_000_000])


def test_a_port_sends_and_receives_first_in_first_out() -> None:
    released, there = posted(
        [(0, 0, 1, 10_000), (0, 0, 2, 10_000), (0, 1, 2, 20_000), (0, 3, 2, 10_000)]
    )
    assert released == [1_000_000, 2_000_000, 2_000_000, 1_000_000]
    # rank 2's port: from 1 at 1 ms (2 ms long), from 3 queued behind it, from 0, which left a
    # millisecond later, last
    assert there == [2_000_000, 5_000_000, 3_000_000, 4_000_000]


def test_ports_are_full_duplex_and_paths_do_not_share() -> None:
    assert posted([(0, 0, 1, 10_000), (0, 1, 0, 10_000), (0, 2, 3, 10_000)])[1] == [2_000_000] * 3


def test_incast_slows_what_has_to_queue() -> None:
    assert posted([(0, 0, 2, 10_000), (0, 1, 2, 10_000)], incast=1.5)[1] == [2_000_000, 3_500_000]


def test_without_a_rate_only_the_latency_is_left_and_inside_a_host_nothing() -> None:
    clock = VirtualClock()
    network = Network(clock, [0, 0, 1], latency_us=7.0)
    near = Parcel()
    far = Parcel()

    def life() -> None:
        network.post(near, 0, 1, 10**9)
        network.post(far, 0, 2, 10**9)

    clock.spawn(0, life)
    clock.run()
    assert (near.at, far.at) == (0, 7000)


def test_what_is_sent_is_what_arrives_though_the_sender_goes_on() -> None:
    def body(comm: VirtualComm) -> list[float]:
        if comm.rank == 0:
            x = torch.zeros(1000)
            for step in range(3):
                x.fill_(step)
                comm.send(x, 1)  # released when its last byte has left: then it may be overwritten
            return []
        comm.clock.wait_until(10**9)  # asks long after all have left
        got = torch.zeros(1000)
        return [float(comm.recv(got, 0) or got[0]) for _ in range(3)]

    assert virtual_ranks(2, body, link_mbit=MBIT)[1] == [0.0, 1.0, 2.0]


def test_messages_of_unequal_length_are_refused() -> None:
    def body(comm: VirtualComm) -> None:
        (comm.send if comm.rank == 0 else comm.recv)(torch.zeros(3 + comm.rank), 1 - comm.rank)

    with pytest.raises(
        RuntimeError, match="a message of 3 elements from rank 0 for a receive of 4 on rank 1"
    ):
        virtual_ranks(2, body)


def test_ranks_that_call_different_collectives_are_named() -> None:
    def body(comm: VirtualComm) -> None:
        comm.barrier() if comm.rank == 1 else comm.all_reduce(torch.zeros(5))

    with pytest.raises(
        RuntimeError, match="rank 1 calls barrier of 0 elements while others call all_reduce of 5"
    ):
        virtual_ranks(2, body)


def ring_s(size: int, numel: int, **link: float) -> float:
    def body(comm: VirtualComm) -> int:
        topology = Ring(segment_kib=1 << 20)
        topology.start(comm)
        topology.mean(torch.zeros(numel))
        return comm.now_ns()

    return max(virtual_ranks(size, body, **link)) / 1e9


@pytest.mark.parametrize("size", [4, 16, 64])
def test_a_ring_takes_2_n_minus_1_rounds_of_a_chunk(size: int) -> None:
    numel = 64_000
    found = ring_s(size, numel, link_mbit=MBIT, latency_us=ALPHA * 1e6)
    theory = 2 * (size - 1) * (ALPHA + 4 * numel / size * BETA)
    assert abs(found / theory - 1) < 0.02, f"{found:.6f} s, theory {theory:.6f} s"


def exchange(
    size: int, sync: str = "synchronous", steps: int = 20, **fields: Any
) -> dict[str, Any]:
    """Steps of `size` workers that compute in no time, over one server on its own host: result and
    times."""
    cell = resolve(
        Cell(
            workload="mlp",
            preset="smoke",
            sync=sync,
            topology="parameter_server",
            replicas=size,
            clock="virtual",
            gradients="none",
            batch_mode="fixed_per_worker",
            compute_time={"kind": "fixed", "mean_s": 1e-9},
            link_mbit=MBIT,
            link_latency_us=LAN * 1e6,
            budget=Budget(steps=steps),
            options={"mlp": {"num_parameters": 20_000}},
            **fields,
        )
    )
    result, cost, _ = run(cell, "unused")
    return {**result, **cost}


@pytest.mark.parametrize("size", [4, 16, 64])
def test_a_parameter_server_takes_n_m_beta_each_way_and_n_plus_1_in_steady_state(size: int) -> None:
    one = exchange(size, steps=1)
    many = exchange(size, steps=21)
    moved = 4 * 20_000 * BETA
    first = 2 * LAN + 2 * size * moved
    assert abs(one["virtual_s"] / first - 1) < 0.02, (
        f"{one['virtual_s']:.4f} s, theory {first:.4f} s"
    )
    step = (many["virtual_s"] - one["virtual_s"]) / 20
    theory = (
        size + 1
    ) * moved  # answers go out one by one, and whoever has his pushes while the others still wait
    assert abs(step / theory - 1) < 0.02, f"{step:.4f} s, theory {theory:.4f} s"


@pytest.mark.parametrize("size", [4, 16, 64])
def test_the_servers_port_carries_n_m_each_way_and_a_rings_2_n_minus_1_over_n(size: int) -> None:
    vector = 4 * 20_000
    server = exchange(size, steps=3)
    assert server["busiest_port_bytes"] == 3 * size * vector
    cell = resolve(
        Cell(
            workload="mlp",
            preset="smoke",
            topology="ring",
            replicas=size,
            clock="virtual",
            gradients="none",
            batch_mode="fixed_per_worker",
            budget=Budget(steps=3),
            options={"mlp": {"num_parameters": 20_000}},
        )
    )
    result, _, _ = run(cell, "unused")
    ideal = 3 * 2 * (size - 1) / size * vector
    assert abs(result["busiest_port_bytes"] / ideal - 1) < 0.02, (
        f"{result['busiest_port_bytes']}, ideal {ideal:.0f}"
    )
    assert result["busiest_port_bytes"] < server["busiest_port_bytes"]


def test_the_librarys_all_reduce_is_priced_like_a_ring_and_its_bytes_derived() -> None:
    def body(comm: VirtualComm) -> tuple[int, Any]:
        comm.all_reduce(torch.zeros(64_000))
        return comm.now_ns(), comm.calls

    found = virtual_ranks(16, body, link_mbit=MBIT, latency_us=ALPHA * 1e6)
    theory = 2 * 15 * (ALPHA + 4 * 64_000 / 16 * BETA)
    assert {now for now, _ in found} == {round(theory * 1e9)}
    assert sum(len(calls) for _, calls in found) == 1, "counted once, by the last who entered"
