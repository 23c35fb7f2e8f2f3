"""Virtual time itself: order, waiting, deadlocks, errors, what may not leak from rank to rank,
lanes and locks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchsuite.laws.harness.virtual_ranks import virtual_ranks
from benchsuite.virtual.clock import Deadlock, VirtualClock
from benchsuite.virtual.comm import VirtualComm


def ranks(count: int, body: Callable[[VirtualClock, int], None], order: Any = None) -> VirtualClock:
    clock = VirtualClock()
    for rank in order or range(count):
        clock.spawn(rank, functools.partial(body, clock, rank))
    clock.run()
    return clock


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (2, 1, 0)])
def test_what_happens_at_one_moment_happens_in_rank_order(order: tuple[int, ...]) -> None:
    seen: list[tuple[int, int]] = []

    def body(clock: VirtualClock, rank: int) -> None:
        for wait in (5, 10 - rank, 5 + rank):  # at 5 all, at 13 .. 15 one by one, at 20 all
            clock.wait_until(clock.now + wait)
            seen.append((clock.now, rank))

    ranks(3, body, order)
    assert seen == [(5, 0), (5, 1), (5, 2), (13, 2), (14, 1), (15, 0), (20, 0), (20, 1), (20, 2)]


def test_a_time_that_is_over_is_not_waited_for_and_integers_stay_exact() -> None:
    def body(clock: VirtualClock, rank: int) -> None:
        clock.wait_until(3)
        clock.wait_until(2)
        assert clock.now == 3
        clock.wait_until(2**62 + 1)

    assert ranks(1, body).now == 2**62 + 1


def test_a_deadlock_says_who_waits_for_whom() -> None:
    def body(comm: VirtualComm) -> None:
        if comm.rank < 2:
            comm.recv(torch.zeros(3), 1 - comm.rank)
        else:
            comm.next_ticket()

    with pytest.raises(
        Deadlock,
        match=r"rank 0 for a message from rank 1; rank 1 for a message from rank 0; rank 2 for a t",
    ):
        virtual_ranks(3, body)


def test_the_error_of_a_rank_names_rank_and_time_and_ends_the_others() -> None:
    ended: list[int] = []

    def body(clock: VirtualClock, rank: int) -> None:
        try:
            clock.wait_until(1_500_000_000)
            if rank == 1:
                raise ZeroDivisionError("once")
            clock.wait_until(10**12)
        finally:
            ended.append(rank)

    with pytest.raises(ZeroDivisionError, match="once") as caught:
        ranks(3, body)
    assert caught.value.__notes__ == ["on rank 1, at 1.5 virtual seconds"]
    assert sorted(ended) == [0, 1, 2]


def test_a_thousand_ranks_start_and_wait() -> None:
    """Each that starts the next one from its own frames would run into Python's recursion limit."""
    assert ranks(1500, lambda clock, rank: clock.wait_until(rank + 1)).now == 1500


def test_grad_mode_autocast_and_random_state_stay_with_their_rank() -> None:
    drawn: dict[int, list[float]] = {}

    def body(clock: VirtualClock, rank: int) -> None:
        torch.manual_seed(rank)
        with torch.set_grad_enabled(rank != 1), torch.autocast("cpu", enabled=rank == 2):
            for _ in range(3):
                drawn.setdefault(rank, []).append(float(torch.rand(())))
                clock.wait_until(clock.now + 1)
                assert torch.is_grad_enabled() == (rank != 1)
                assert torch.is_autocast_enabled("cpu") == (rank == 2)

    torch.manual_seed(99)
    outside = torch.get_rng_state()
    ranks(3, body)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), outside), "the thread's own random state is as it was"
    for rank, values in drawn.items():
        torch.manual_seed(rank)
        assert values == [float(torch.rand(())) for _ in range(3)]


def test_waiting_inside_inference_mode_is_refused() -> None:
    def body(clock: VirtualClock, rank: int) -> None:
        with torch.inference_mode():
            clock.wait_until(1)

    with pytest.raises(RuntimeError, match="inference_mode.*use no_grad"):
        ranks(1, body)


def test_a_lane_works_while_its_rank_computes() -> None:
    def body(comm: VirtualComm) -> tuple[int, int]:
        clock = comm.clock

        def transfer(lane: VirtualComm, x: torch.Tensor) -> int:
            lane.sendrecv(x, 1 - lane.rank, torch.empty_like(x), 1 - lane.rank)
            return lane.now_ns()

        handle = comm.lane(transfer, torch.zeros(250_000))  # 1 MB at 8 Mbit/s: a second
        clock.wait_until(700_000_000)
        moved = handle.wait()
        return moved, clock.now

    assert virtual_ranks(2, body, link_mbit=8.0) == [(10**9, 10**9)] * 2, (
        "0.7 s of computing are hidden behind 1 s"
    )


def test_a_gradient_is_given_up_when_its_handle_is_done_first() -> None:
    from benchsuite.parallel.data import DataPart
    from benchsuite.plan.cell import Cell, resolve
    from benchsuite.virtual.gradients import Gradients
    from benchsuite.virtual.part import Pool, VirtualPart
    from benchsuite.worker import setup

    cell = resolve(Cell(workload="mlp", preset="smoke"))
    workload, template = setup.build_part(cell)
    assert isinstance(template, DataPart)

    class OneSecond:
        def ns(self, worker: int, step: int) -> int:
            return 10**9

    def body(comm: VirtualComm) -> list[Any]:
        if comm.rank == 1:
            for at in (4 * 10**8, 3 * 10**9):
                comm.clock.wait_until(at)
                comm.send(torch.ones(1), 0)
            return []
        pool = Pool(template, Gradients(workload, template, seed=0), num_ranks=1)
        part = VirtualPart(pool, comm.clock, OneSecond(), rank=0)
        batch = workload.batch(0, shard=0, num_shards=1)
        found = []
        for _ in range(2):
            answer = comm.irecv(torch.zeros(1), 1)
            loss = part.gradient(batch, until=answer)
            found.append((loss is None, comm.now_ns()))
            answer.wait()
        return [*found, part.compute_ns, pool.num_gradients, pool.num_abandoned]

    given_up, finished, compute_ns, computed, abandoned = virtual_ranks(2, body)[0]
    assert given_up == (True, 4 * 10**8) and finished == (False, 14 * 10**8)
    assert (compute_ns, computed, abandoned) == (14 * 10**8, 1, 1)


def test_slices_are_ready_in_backward_order_at_their_share_of_the_time() -> None:
    from benchsuite.plan.cell import Cell, resolve
    from benchsuite.virtual.gradients import Gradients
    from benchsuite.virtual.part import Pool, VirtualPart
    from benchsuite.worker import setup

    cell = resolve(Cell(workload="mlp", preset="smoke"))
    workload, template = setup.build_part(cell)

    class ThreeSeconds:
        def ns(self, worker: int, step: int) -> int:
            return 3 * 10**9

    def body(comm: VirtualComm) -> list[tuple[int, int, int]]:
        pool = Pool(template, Gradients(workload, template, seed=0), num_ranks=1)  # type: ignore[arg-type]
        part = VirtualPart(pool, comm.clock, ThreeSeconds(), rank=0)
        seen: list[tuple[int, int, int]] = []
        part.gradient(
            workload.batch(0, shard=0, num_shards=1),
            lambda a, b: seen.append((a, b, comm.now_ns())),
        )
        assert comm.now_ns() == 3 * 10**9
        return seen

    seen = virtual_ranks(1, body)[0]
    total = template.params.numel()
    assert seen[0][1] == total and seen[-1][0] == 0
    assert all(later[1] == earlier[0] for earlier, later in itertools.pairwise(seen)), (
        "backwards, without gaps"
    )
    for start, _, at in seen:
        assert at == 10**9 + 2 * 10**9 * (total - start) // total


def test_a_lock_is_given_in_the_order_of_asking() -> None:
    got: list[tuple[int, int]] = []

    def body(comm: VirtualComm) -> None:
        lock = comm.lock("mine")
        comm.clock.wait_until(10 - comm.rank)
        with lock:
            got.append((comm.rank, comm.now_ns()))
            comm.clock.wait_until(comm.now_ns() + 100)

    virtual_ranks(3, body)
    assert got == [(2, 8), (1, 108), (0, 208)]
