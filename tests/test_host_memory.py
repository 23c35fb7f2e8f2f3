"""Memory shared inside a host, and the barrier of its ranks: sums, traffic, who is named when a
peer is gone."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchsuite.cluster.local import Cluster
from benchsuite.comm import Traffic
from benchsuite.comm.socket_barrier import SocketBarrier
from benchsuite.laws import Law
from benchsuite.laws.harness.memory_store import MemoryStore
from benchsuite.laws.harness.process_ranks import process_ranks
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.laws.harness.runs import count_different
from benchsuite.laws.harness.virtual_ranks import virtual_ranks
from benchsuite.laws.topology import counted_is_predicted, integer_mean, vector
from benchsuite.plan.cell import Budget, Cell, trajectory_key
from benchsuite.topology.hierarchical import Topology as Hierarchical
from benchsuite.topology.host_memory import PIPELINED_BYTES
from benchsuite.worker.build import build
from benchsuite.worker.predict import predicted
from tests.law_cells import RECIPES, cases, tiny
from tests.virtual_runs import run

WORLDS = {
    "gloo": thread_ranks,
    "nccl's rounds": partial(thread_ranks, strict="nccl"),
    "virtual": virtual_ranks,
    "virtual rounds": partial(virtual_ranks, strict="nccl"),
}

HIERARCHICAL = [
    tiny(topology="hierarchical", replicas=n, options={"hierarchical": {"across": across}})
    for n in (2, 3, 4, 5)
    for across in ("ring", "native")
]
ON_TWO_HOSTS = [
    tiny(
        RECIPES[2],
        topology="hierarchical",
        replicas=n,
        hosts=2,
        options={"hierarchical": {"across": across}},
    )
    for n in (2, 3, 4)
    for across in ("ring", "native")
]
IN_BUCKETS = [
    tiny(
        RECIPES[2],
        topology="hierarchical",
        replicas=3,
        hosts=hosts,
        options={"synchronous": {"bucket_mib": 0.002}},
    )
    for hosts in (1, 2)
]


@pytest.mark.parametrize("ranks", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize(("law", "cell"), list(cases("hierarchical", HIERARCHICAL)))
def test_two_levels(law: Law, cell: Cell, ranks: Any) -> None:
    figure = law.check(ranks, cell)
    assert figure.holds, f"{law.name}: {figure}"


@pytest.mark.parametrize("ranks", [thread_ranks, virtual_ranks], ids=["gloo", "virtual"])
@pytest.mark.parametrize(
    ("law", "cell"),
    [
        case
        for family in ("synchronous", "traffic")
        for case in cases(family, [*ON_TWO_HOSTS, *IN_BUCKETS])
    ],
)
def test_training_on_two_hosts(law: Law, cell: Cell, ranks: Any) -> None:
    figure = law.check(ranks, cell)
    assert figure.holds, f"{law.name}: {figure}"


@pytest.mark.procs
@pytest.mark.timeout(120)
def test_processes_share_their_hosts_memory(tmp_path: Path) -> None:
    with Cluster() as cluster:
        ranks = process_ranks(cluster, tmp_path)
        for hosts, law in ((1, integer_mean), (1, counted_is_predicted), (2, integer_mean)):
            figure = law(
                ranks,
                tiny(
                    topology="hierarchical", replicas=3, hosts=hosts, budget=Budget(timeout_s=30.0)
                ),
            )
            assert figure.holds, f"{law.__name__} on {hosts} hosts: {figure}"


def _large(comm: Any) -> tuple[int, int, int]:
    """Elements that differ from the serial sum after two means of 16 MiB and a bit; bytes in
    memory; predicted ones."""
    numel = PIPELINED_BYTES // 4 + 12_345
    different = 0
    topology = Hierarchical()
    topology.start(comm)
    for round_ in range(2):
        flat = vector(comm.rank, numel, round_, integers=False)
        topology.mean(flat)
        total = vector(0, numel, round_, integers=False)
        for rank in range(1, comm.size):
            total += vector(rank, numel, round_, integers=False)
        different += count_different(flat, total / comm.size)
    told = topology.predicted_traffic(numel, 4, num_workers=comm.size).shm
    mine = comm.traffic.shm_bytes
    return different, mine, 2 * sum(told.values())


@pytest.mark.parametrize("ranks", [thread_ranks, virtual_ranks], ids=["gloo", "virtual"])
def test_from_16_mib_on_chunks_overlap_and_the_sum_is_the_same(ranks: Any) -> None:
    found = ranks(3, _large)
    assert [different for different, _, _ in found] == [0, 0, 0]
    assert sum(mine for _, mine, _ in found) == found[0][2]


def test_the_gradient_lives_in_the_hosts_memory() -> None:
    cell = tiny(topology="hierarchical", replicas=3)

    def body(comm: Any) -> tuple[bool, bool, float]:
        comm.hosts = [0, 0, 1]
        training = build(cell, comm)
        memory = training.topology._memory
        grad = training.part.grad
        if comm.rank == 2:
            return memory is None, True, 0.0  # alone on its host: ordinary memory
        before = float(memory.place_of(grad).rows[1 - comm.rank].sum())
        comm.barrier()
        grad.fill_(1.0 + comm.rank)
        comm.barrier()
        seen = float(
            memory.place_of(grad).rows[1 - comm.rank][-1]
        )  # what the other one has written
        return before == 0.0, memory.place_of(torch.zeros(3)) is None, seen

    def with_barriers(comm: Any) -> tuple[bool, bool, float]:
        found = body(comm)
        if comm.rank == 2:
            comm.barrier()
            comm.barrier()
        return found

    assert thread_ranks(3, with_barriers) == [
        (True, True, 2.0),
        (True, True, 1.0),
        (True, True, 0.0),
    ]


# -- the barrier of one host -----------------------------------------------------------------------


def _rounds(comm: Any) -> int:
    """Rounds in which a rank left the barrier before another had come."""
    part = comm.split(range(comm.size))
    seen = part.shared("seen", comm.size, torch.int64)
    early = 0
    for round_ in range(1, 301):
        seen[comm.rank] = round_
        part.barrier()
        early += int(seen.min()) < round_
        part.barrier()
    assert part.wait_ns > 0 and part._sockets is not None and comm._sockets is None
    return early


@pytest.mark.parametrize("size", [2, 3, 4])
def test_nobody_leaves_a_hosts_barrier_before_all_have_come(size: int) -> None:
    assert thread_ranks(size, _rounds) == [0] * size


def test_a_split_over_two_hosts_has_the_groups_barrier() -> None:
    def body(comm: Any) -> bool:
        part = comm.split([0, 1])
        part.barrier()
        return part._sockets is None

    assert thread_ranks(2, body, hosts=[0, 1]) == [True, True]


_DIES = """
import os, signal, sys
import torch.distributed as dist
from benchsuite.comm.socket_barrier import SocketBarrier

barrier = SocketBarrier(dist.FileStore(sys.argv[1], 2), rank=1, names=[5, 7], timeout_s=20.0)
barrier.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.procs
@pytest.mark.timeout(60)
def test_a_killed_peer_is_named_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    child = subprocess.Popen([sys.executable, "-c", _DIES, path], cwd=Path(__file__).parent.parent)
    try:
        barrier = SocketBarrier(dist.FileStore(path, 2), rank=0, names=[5, 7], timeout_s=20.0)
        barrier.wait()
        with pytest.raises(
            RuntimeError, match="rank 7 is gone: its end of the host's barrier was closed by peer"
        ):
            barrier.wait()
        with pytest.raises(RuntimeError, match="rank 7 is gone"):
            barrier.wait()  # the stream is broken now
        barrier.close()
    finally:
        child.wait(20)
    assert child.returncode == -signal.SIGKILL


def pair(*, timeout_s: float = 10.0) -> list[SocketBarrier]:
    """The two ends of a barrier."""
    store = MemoryStore(timeout_s=10.0)
    made = {}

    def make(rank: int) -> None:
        made[rank] = SocketBarrier(store, rank=rank, names=[5, 7], timeout_s=timeout_s)

    threads = [threading.Thread(target=make, args=(rank,), daemon=True) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return [made[0], made[1]]


def test_a_peer_that_does_not_come_is_named() -> None:
    first, _second = pair(timeout_s=0.3)
    with pytest.raises(
        RuntimeError, match="rank 7 did not come to the barrier of its host: timed out after 0.3 s"
    ):
        first.wait()


def test_a_stranger_at_the_door_is_hung_up_on() -> None:
    store = MemoryStore(timeout_s=10.0)
    made: list[SocketBarrier] = []
    first = threading.Thread(
        target=lambda: made.append(SocketBarrier(store, rank=0, names=[0, 1], timeout_s=10.0)),
        daemon=True,
    )
    first.start()
    published = store.get("barrier/0")
    for greeting in (b"x" * 20, b""):  # a wrong secret, a greeting that is cut short
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
            stranger.connect(b"\0" + published[16:])
            stranger.sendall(greeting)
            stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(5.0)
            assert stranger.recv(1) == b""
    other = SocketBarrier(store, rank=1, names=[0, 1], timeout_s=10.0)
    first.join(10)
    waiting = threading.Thread(target=other.wait, daemon=True)
    waiting.start()
    made[0].wait()
    waiting.join(10)
    assert not waiting.is_alive()


# -- cells -----------------------------------------------------------------------------------------


def two_hosts(**fields: Any) -> Cell:
    return tiny(topology="hierarchical", replicas=4, clock="virtual", **{"hosts": 2, **fields})


def test_in_virtual_time_only_the_first_ranks_of_hosts_use_the_links(tmp_path: Path) -> None:
    result, _, _ = run(two_hosts(link_mbit=1.0, link_latency_us=10.0), tmp_path)
    vector_bytes = 8 * result["num_parameters"]
    steps = result["updates"]
    assert result["payload_source"] == "counted"
    assert result["payload_bytes"] == result["predicted_bytes"] == 2 * vector_bytes * steps
    assert (
        result["busiest_port_bytes"] == vector_bytes * steps
    )  # half of the vector out, and in, in each phase
    assert {(a, b) for a, b, _ in result["payload"]["payload"]} == {(0, 2), (2, 0)}
    told = Traffic.from_json(result["predicted"])
    assert result["shm_bytes"] == told.shm_bytes and told.shm_bytes > 2 * 2 * vector_bytes * steps


def test_across_native_is_derived_where_there_are_several_hosts(tmp_path: Path) -> None:
    native = {"hierarchical": {"across": "native"}}
    result, _, _ = run(two_hosts(options=native), tmp_path)
    assert (
        result["payload_source"] == "derived"
        and result["payload_bytes"] == result["predicted_bytes"] > 0
    )
    alone, _, _ = run(two_hosts(options=native, hosts=1), tmp_path)
    assert (
        alone["payload_source"] == "counted"
        and alone["payload_bytes"] == alone["predicted_bytes"] == 0
    )
    assert alone["shm_bytes"] == 2 * 3 * 8 * alone["num_parameters"] * alone["updates"]


def test_the_prediction_before_a_run_knows_the_cells_hosts() -> None:
    one = predicted(two_hosts(hosts=1))
    two = predicted(two_hosts())
    assert one.payload_bytes == 0 and one.shm_bytes % 6 == 0
    vectors = one.shm_bytes // 6  # M x steps
    assert two.payload_bytes == 2 * vectors and set(two.payload) == {(0, 2), (2, 0)}


def test_who_shares_a_host_is_part_of_a_hierarchical_trajectory_and_of_no_other() -> None:
    assert trajectory_key(two_hosts()) != trajectory_key(two_hosts(hosts=1))
    assert trajectory_key(two_hosts(link_mbit=1.0)) == trajectory_key(two_hosts())
    ring = {"topology": "ring", "replicas": 4, "clock": "virtual"}
    assert trajectory_key(tiny(**ring, hosts=2)) == trajectory_key(tiny(**ring)) is not None
