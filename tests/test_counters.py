"""What a rank counts is complete when its lanes and server threads count at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchsuite.comm.process import NO_GROUP, ProcessComm
from benchsuite.comm.traffic import Traffic

THREADS = 4
TIMES = 20_000
WHOLE = THREADS * TIMES


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    """Python changes threads as often as it can: what may be torn apart is."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(count: Callable[[int], None]) -> None:
    """`count(thread)` TIMES times on each of THREADS threads, begun together."""
    together = threading.Barrier(THREADS)

    def repeat(thread: int) -> None:
        together.wait()
        for _ in range(TIMES):
            count(thread)

    threads = [threading.Thread(target=repeat, args=(at,)) for at in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Torn(Traffic):
    """A broken twin: it adds as if a rank had one thread."""

    def add(self, source: int, destination: int, payload_bytes: int, messages: int = 1) -> None:
        edge = (source, destination)
        self.payload[edge] = self.payload.get(edge, 0) + payload_bytes
        self.messages[edge] = self.messages.get(edge, 0) + messages


def test_no_byte_is_lost_where_threads_count_at_once() -> None:
    traffic = Traffic()
    more = Traffic({(0, 1): 3}, {(0, 1): 1}, {(2, 3): 5}, {0: 7})

    def count(_: int) -> None:
        traffic.add(0, 1, 40)
        traffic.add_shm(2, 3, 8)
        traffic.add_control(0, 20)
        traffic.include(more)

    at_once(count)
    assert traffic == Traffic(
        {(0, 1): 43 * WHOLE}, {(0, 1): 2 * WHOLE}, {(2, 3): 13 * WHOLE}, {0: 27 * WHOLE}
    )


def test_threads_that_count_without_a_lock_lose_bytes() -> None:
    """The negative control: else the laws of this file could not fail."""
    for _ in range(20):
        torn = Torn()
        at_once(lambda _: torn.add(0, 1, 40))  # noqa: B023  called before the next turn
        if torn.payload_bytes < 40 * WHOLE:
            return
    pytest.fail(f"20 x {WHOLE} additions without a lock, and none was lost")


def test_a_copy_made_while_others_count_is_whole() -> None:
    """New edges grow the tables, which cannot be walked through meanwhile."""
    traffic = Traffic()
    copies: list[Traffic] = []

    def count(thread: int) -> None:
        if thread:
            traffic.add(thread, len(traffic.payload), 40)
        elif len(copies) < 100:
            copies.append(traffic + Traffic())

    at_once(count)
    assert len(copies) == 100
    assert all(copy.payload_bytes == 40 * copy.num_messages for copy in copies)
    assert traffic.payload_bytes == 40 * WHOLE * (THREADS - 1) // THREADS


class Sent:
    """What a process group answers."""

    def wait(self) -> None:
        """It is done."""


class Silent:
    """A process group that sends nothing."""

    def send(self, tensors: Any, rank: int, tag: int) -> Sent:
        return Sent()

    def allreduce(self, tensors: Any) -> Sent:
        return Sent()


def test_a_rank_and_its_lanes_count_into_one_sum() -> None:
    """Sends, calls of the library and control bytes of comms that share a rank's counters."""
    store = SimpleNamespace(add=lambda name, n: n, prefixed=lambda prefix: store)
    world = SimpleNamespace(
        backend="gloo", strict="", staged=False, store=store, device=torch.device("cpu")
    )
    rank = ProcessComm(world, rank=0, size=3, group=NO_GROUP)  # type: ignore[arg-type]
    lanes = [rank, *(rank.lane_comm() for _ in range(THREADS - 1))]
    for comm in lanes:
        comm._group = Silent()
    vector = torch.zeros(10)

    def count(thread: int) -> None:
        comm = lanes[thread]
        comm.send(vector, 1)
        comm.all_reduce(vector)
        comm.fetch_add("batches", 1)

    at_once(count)
    assert rank.traffic == Traffic({(0, 1): 40 * WHOLE}, {(0, 1): WHOLE}, {}, {0: 8 * WHOLE})
    assert rank.calls == {("allreduce", 10, 4, (0, 1, 2)): WHOLE}
