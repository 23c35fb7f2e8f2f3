"""What the ranks of `benchsuite selfcheck` do where no training is asked for: nothing, all-reduce, server loops.

Each entry is called with a job, connects as a worker does, and leaves `{name: [ns, ..]}` as its record.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchsuite import cell as cells
from benchsuite.comm.process import ProcessComm
from benchsuite.comm.rendezvous import connect, open_store
from benchsuite.job import RankJob, write_rank_file
from benchsuite.measure.bench import read_order
from benchsuite.topology.native import Topology as Native
from benchsuite.topology.parameter_server import Topology as ParameterServer
from benchsuite.topology.ring import Topology as Ring

WARMUP = 2
BLOCKS = 4  # of updates: the two server loops take turns


def empty(job: RankJob) -> None:
    """Starts and ends."""
    write_rank_file(job.run_dir, job.rank, "{}")


def ring(job: RankJob) -> None:
    """`all_reduce` (gloo's own, a sum), `native` (the same, divided: the mean), `ring` (the mean), in random order."""
    comm = _connected(job)
    order = random.Random(job.cell["seed"])  # the same on every rank
    record: dict[str, list[int]] = {}
    native, ours = Native(), Ring()
    native.start(comm)
    ours.start(comm)
    for size, repetitions in _sizes(job).items():
        x = torch.ones(size // 4)
        variants: dict[str, Callable[[Tensor], None]] = {
            "all_reduce": comm.all_reduce, "native": native.mean, "ring": ours.mean,
        }  # fmt: skip
        names = sorted(variants)
        for repetition in range(WARMUP + repetitions):
            order.shuffle(names)
            for name in names:
                x.fill_(1.0)  # a sum in place would run away
                taken = _timed(comm, variants[name], x)
                if repetition >= WARMUP:
                    record.setdefault(f"{name} {size}", []).append(taken)
    write_rank_file(job.run_dir, job.rank, json.dumps(record))
    comm.barrier()


def _timed(comm: ProcessComm, operation: Callable[[Tensor], None], x: Tensor) -> int:
    comm.barrier()
    begin = time.perf_counter_ns()
    operation(x)
    return time.perf_counter_ns() - begin


def server(job: RankJob) -> None:
    """ns per update of the suite's loop (`tickets`) and of one that knows the order of its pushes (`known order`).

    Rank 0 is the worker, rank 1 the server; each update is a push, `add_`, and an answer.
    """
    comm = _connected(job)
    record: dict[str, list[int]] = {}
    for size, updates in _sizes(job).items():
        topology = ParameterServer()
        topology.start(comm, num_servers=1)
        mine, answer = torch.ones(size // 4), torch.zeros(size // 4)
        count = -(-updates // BLOCKS)
        for block in range(2 * (BLOCKS + 1)):
            name = ("tickets", "known order")[block % 2]
            loop = _by_ticket if name == "tickets" else _in_order
            comm.barrier()
            begin = time.perf_counter_ns()
            loop(comm, topology, mine, answer, count)
            if block >= 2:  # the first of each warms up
                record.setdefault(f"{name} {size}", []).append((time.perf_counter_ns() - begin) // count)
    write_rank_file(job.run_dir, job.rank, json.dumps(record))
    comm.barrier()


def _by_ticket(comm: ProcessComm, topology: ParameterServer, mine: Tensor, answer: Tensor, count: int) -> None:
    if comm.rank == 0:
        for update in range(count):
            topology.exchange(mine, answer, tag=update)
        topology.goodbye()
    else:
        topology.serve(mine, _no_updater, AddAndAnswer(), samples_per_push=1, num_pushes=count)


def _in_order(comm: ProcessComm, topology: ParameterServer, mine: Tensor, answer: Tensor, count: int) -> None:
    for _ in range(count):
        if comm.rank == 0:
            receiving = comm.irecv(answer, 1)
            comm.send(mine, 1)
            receiving.wait()
        else:
            comm.recv(answer, 0)
            mine.add_(answer)
            comm.send(mine, 0)


class AddAndAnswer:
    """The cheapest policy: what is left is the loop and the wire."""

    def start(self, shard: Tensor, apply: Any) -> None:
        self._shard = shard

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        self._shard.add_(flat)
        return [worker]

    def on_goodbye(self, worker: int) -> list[int]:
        return []

    def answer(self, worker: int) -> Tensor:
        return self._shard

    def snapshot(self) -> Tensor:
        return self._shard


def _no_updater() -> Any:
    raise AssertionError("this policy applies nothing")


def _connected(job: RankJob) -> ProcessComm:
    torch.set_num_threads(1)
    cell = cells.from_json(job.cell)
    return connect(job, cell, open_store(job), None)


def _sizes(job: RankJob) -> dict[int, int]:
    """Size -> repetitions, as `selfcheck` wrote them into the run directory."""
    return {int(size): int(count) for size, count in read_order(job.run_dir).items()}
