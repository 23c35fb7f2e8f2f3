"""Ranks for laws that are threads of this process.

Each has its own gloo group, model and view of the store. They are never used to measure time.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from benchsuite.comm.groups import World
from benchsuite.comm.process import ProcessComm
from benchsuite.laws.harness.memory_store import MemoryStore

T = TypeVar("T")
MANY_FILES = 300  # a process may open about 1000


def thread_ranks(
    size: int,
    body: Callable[[ProcessComm], T],
    *,
    strict: str = "",
    hosts: Sequence[int] = (),
    timeout_s: float = 30.0,
) -> list[T]:
    """Runs `body(comm)` on `size` ranks that are threads and returns what each returned.

    The first error is raised. Each thread counts its own `Traffic`, and groups meet in a store in
    memory.
    """
    _release_sockets()
    store = MemoryStore(timeout_s=timeout_s)
    results: list[Any] = [None] * size
    errors: list[tuple[int, BaseException]] = []
    # All ranks end together: one that sends nothing would hang up on those that still connect.
    ended = threading.Barrier(size)

    def run(rank: int) -> None:
        # Each rank drops its own comm, in parallel: a socket that closes waits for the next turn
        # of its watcher, up to 10 ms.
        comm = None
        try:
            run_as_batch_work()
            # The setting is per thread; a pool for each rank would spin on the others' cores.
            torch.set_num_threads(1)
            world = World(
                store, lambda: store, timeout_s=timeout_s, strict=strict, transport=_transport()
            )
            comm = ProcessComm(world, rank=rank, size=size, hosts=hosts)
            with contextlib.closing(comm):
                results[rank] = body(comm)
        except BaseException as error:  # noqa: BLE001  raised by the caller's thread
            errors.append((rank, error))
        with contextlib.suppress(threading.BrokenBarrierError):
            ended.wait(timeout_s + 10)

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank{rank}", daemon=True)
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s + 10)
    if errors:
        rank, error = errors[0]
        error.add_note(f"on thread rank {rank} of {size}")
        raise error
    stuck = [thread.name for thread in threads if thread.is_alive()]
    if stuck:
        raise TimeoutError(f"{', '.join(stuck)} did not end within {timeout_s + 10} s")
    return results


def run_as_batch_work() -> None:
    """Lets this thread, and all that it starts, no longer take a core from another on waking up.

    gloo's thread asks for a connection again and again, without a pause, while another thread holds
    it. Where waking it took the core from that very thread, both lost a time slice: half of the
    system time of the laws. Only for ranks that are never timed. It is done on Linux; elsewhere,
    and where it is not allowed, nothing happens.
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@functools.cache
def _transport() -> Any:
    """The gloo device that all groups share.

    Making and ending a device takes 10 ms of waiting, and the laws make thousands of groups.
    """
    return dist.ProcessGroupGloo.create_device(interface="lo")


def _release_sockets() -> None:
    """Frees the sockets of groups that have ended, where this process has many open files.

    A group in a reference cycle keeps its sockets until Python looks for cycles, which is too late
    where many ranks have run.
    """
    with contextlib.suppress(OSError):
        if len(os.listdir("/proc/self/fd")) > MANY_FILES:
            gc.collect()
