"""What a schedule says of lanes, sends that are not waited for, groups, and gradients whose slices
leave early."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from benchsuite.parallel.data import DataPart
from benchsuite.plan.cell import Cell, resolve
from benchsuite.programs import chakra
from benchsuite.virtual.clock import VirtualClock
from benchsuite.virtual.comm import VirtualComm
from benchsuite.virtual.comm_world import VirtualWorld
from benchsuite.virtual.network import Network
from benchsuite.virtual.part import VirtualPart
from benchsuite.virtual.schedule import Schedule
from benchsuite.virtual.without_gradients import Losses
from benchsuite.worker import setup
from benchsuite.workload import Batch
from tests.chakra_reader import COLL, COMP, SEND, Trace, faults, read

MLP = resolve(Cell(workload="mlp", clock="virtual"))


def recorded(size: int, body: Callable[[VirtualComm, VirtualClock, Schedule], None]) -> Schedule:
    clock = VirtualClock()
    schedule = Schedule(clock, size)
    network = Network(clock, range(size), link_mbit=100.0, latency_us=50.0)
    world = VirtualWorld(clock, network, schedule=schedule)
    for rank in range(size):
        clock.spawn(
            rank, functools.partial(body, VirtualComm(world, rank=rank, size=size), clock, schedule)
        )
    clock.run()
    return schedule


def traced(schedule: Schedule, groups: dict[str, str], tmp_path: Path) -> Trace:
    paths = tuple(tmp_path / f"{rank}.et" for rank in range(len(schedule.events)))
    for rank, path in enumerate(paths):
        path.write_bytes(chakra.Format().trace(MLP, schedule, rank, groups))
    return read(paths)


def compute(clock: VirtualClock, schedule: Schedule, ns: int) -> None:
    begin = clock.now
    clock.wait_until(begin + ns)
    schedule.computed("gradient", begin)


def test_a_lane_is_forked_from_its_call_and_joined_at_its_wait(tmp_path: Path) -> None:
    def body(comm: VirtualComm, clock: VirtualClock, schedule: Schedule) -> None:
        compute(clock, schedule, 1_000)  # 0
        handle = comm.lane(lambda lane: lane.all_reduce(torch.zeros(10_000)))  # 2, on the lane
        compute(clock, schedule, 5_000)  # 1, meanwhile
        handle.wait()
        compute(clock, schedule, 1_000)  # 3

    schedule = recorded(2, body)
    trace = traced(schedule, {"world/lane": "1"}, tmp_path)
    assert faults(trace) == [] and schedule.groups == {"world/lane": (0, 1)}
    for rank in (0, 1):
        kinds = [trace[rank, number].type for number in range(4)]
        waits = [trace[rank, number].data for number in range(4)]
        assert (kinds, waits) == ([COMP, COMP, COLL, COMP], [[], [0], [0], [1, 2]])
        assert (
            trace[rank, 2].attrs["pg_name"] == "1" and trace[rank, 2].attrs["comm_size"] == 40_000
        )


def test_sends_are_waited_for_where_the_rank_waits_and_gathers_count_what_a_rank_puts_in(
    tmp_path: Path,
) -> None:
    def body(comm: VirtualComm, clock: VirtualClock, schedule: Schedule) -> None:
        if comm.rank == 0:
            sending = comm.isend(torch.zeros(100), 1)  # 0
            compute(clock, schedule, 10)  # 1: it goes on
            sending.wait()
            comm.all_gather(torch.zeros(8), torch.zeros(4))  # 2: and waits here
        else:
            handle = comm.irecv(torch.zeros(100), 0)
            handle.wait()  # 0
            handle.wait()  # nothing new
            comm.all_gather(torch.zeros(8), torch.zeros(4))  # 1

    trace = traced(recorded(2, body), {}, tmp_path)
    assert faults(trace) == [] and {key: node.data for key, node in trace.items()} == {
        (0, 0): [],
        (0, 1): [],
        (0, 2): [1, 0],
        (1, 0): [],
        (1, 1): [0],
    }
    assert trace[0, 2].attrs["comm_size"] == 16 and trace[0, 0].attrs["comm_size"] == 400


def test_what_leaves_in_the_middle_of_a_gradient_waits_for_that_part_of_it(tmp_path: Path) -> None:
    _, template = setup.build_part(MLP)
    assert isinstance(template, DataPart)

    class Fixed:
        def ns(self, worker: int, step: int) -> int:
            return 9_000

    def body(comm: VirtualComm, clock: VirtualClock, schedule: Schedule) -> None:
        if comm.rank == 0:
            part = VirtualPart(Losses(template), clock, Fixed(), rank=0, schedule=schedule)
            sending = []
            part.gradient(
                Batch(None, None, 1), lambda a, b: sending.append(comm.isend(torch.zeros(b - a), 1))
            )
            for handle in sending:
                handle.wait()
        else:
            for shape in reversed(list(template.shapes.values())):
                comm.recv(torch.zeros(shape.numel()), 0)

    trace = traced(recorded(2, body), {}, tmp_path)
    assert faults(trace) == []
    mine = deque(node for (rank, _), node in sorted(trace.items()) if rank == 0)
    for _ in template.shapes:
        part = mine.popleft()
        send = mine.popleft()
        assert (part.type, send.type, send.data) == (COMP, SEND, [part.id])
    assert sum(node.attrs["duration_ns"] for node in trace.values() if node.type == COMP) == 9_000
