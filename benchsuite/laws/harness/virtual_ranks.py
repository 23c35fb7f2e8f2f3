"""Ranks for laws in virtual time: greenlets of this thread on a simulated network.

A body that runs a cell (`runs.one_rank`) gets replicas of `virtual/part.py`, whose gradients are
computed together and take random times, so that asynchronous workers drift apart. Any other body
runs as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from benchsuite.laws.harness import runs
from benchsuite.parallel.data import DataPart
from benchsuite.plan.cell import Cell
from benchsuite.virtual.clock import VirtualClock
from benchsuite.virtual.comm import VirtualComm
from benchsuite.virtual.comm_world import VirtualWorld
from benchsuite.virtual.gradients import Gradients, Graphs, loss_key
from benchsuite.virtual.network import Network
from benchsuite.virtual.part import Pool, Times, VirtualPart
from benchsuite.virtual.replay import PushOrder
from benchsuite.virtual.streams import ComputeTimes
from benchsuite.worker import setup
from benchsuite.worker.setup import Training

T = TypeVar("T")

TIMES: Mapping[str, Any] = {"kind": "exponential", "mean_s": 1.0}


def virtual_ranks(
    size: int,
    body: Callable[[Any], T],
    *,
    strict: str = "",
    hosts: Sequence[int] = (),
    link_mbit: float | None = None,
    latency_us: float | None = None,
    compute_time: Mapping[str, Any] = TIMES,
    start_order: Sequence[int] = (),
    batching: bool = True,
    graphs: dict[str, Graphs] | None = None,
    order: PushOrder | None = None,
) -> list[T]:
    """Runs `body(comm)` on `size` ranks of virtual time and returns what each returned.

    The first error is raised. `strict = "nccl"` means that receives are not posted ahead. On the
    network every rank is a host of its own; `hosts` is what the comm tells about them.
    `start_order` gives the ranks in the order in which they are started. `graphs` holds gradients
    that were traced before. `order`, in the place of `compute_time`, brings about the pushes of a
    recorded run.
    """
    clock = VirtualClock()
    network = Network(clock, range(size), link_mbit=link_mbit, latency_us=latency_us)
    answers = None if order is None else order.counter
    world = VirtualWorld(clock, network, posts_ahead=strict != "nccl", counter_answers=answers)
    times = order or compute_time
    body = _with_virtual_parts(
        body, clock, times, graphs if graphs is not None else {}, batching=batching
    )
    results: list[Any] = [None] * size

    def life(rank: int) -> None:
        results[rank] = body(VirtualComm(world, rank=rank, size=size, hosts=hosts))

    for rank in start_order or range(size):
        clock.spawn(rank, functools.partial(life, rank))
    clock.run()
    return results


def _with_virtual_parts(
    body: Callable[[Any], T],
    clock: VirtualClock,
    compute_time: Mapping[str, Any] | PushOrder,
    graphs: dict[str, Graphs],
    *,
    batching: bool,
) -> Callable[[Any], T]:
    """The body with one more change before its own: the rank's part is one of a common pool."""
    if not isinstance(body, functools.partial) or body.func is not runs.one_rank:
        return body
    cell: Cell = body.keywords["cell"]
    pools: list[Pool] = []
    samples = runs.recipe_of(cell).global_batch / cell.num_workers
    times: Times
    if isinstance(compute_time, PushOrder):
        times = compute_time
    else:
        factors = {int(worker): factor for worker, factor in cell.straggler.items()}
        times = ComputeTimes(compute_time, seed=cell.seed, samples=samples, factors=factors)

    def change(training: Training) -> Training:
        if not pools:
            workload, template = setup.build_part(cell)
            assert isinstance(template, DataPart)
            traced = graphs.setdefault(loss_key(cell), {})
            gradients = Gradients(
                workload, template, seed=cell.seed, traced=traced, batching=batching
            )
            pools.append(Pool(template, gradients, num_ranks=cell.world_size))
        return runs.rebuilt(
            training, part=VirtualPart(pools[0], clock, times, rank=training.comm.rank)
        )

    made: Callable[[Any], T] = functools.partial(
        body, change=runs.both(change, body.keywords["change"])
    )
    return made
