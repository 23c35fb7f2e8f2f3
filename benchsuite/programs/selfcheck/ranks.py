"""What the ranks of `benchsuite selfcheck` do where they do not train.

They do nothing, reduce vectors or run server loops. Each entry is called with a job, connects as a
worker does, and leaves `{name: [ns, ..]}` as its record.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchsuite.comm.process import ProcessComm
from benchsuite.plan.cell import from_json
from benchsuite.programs.bench import read_order
from benchsuite.topology.hierarchical import Topology as Hierarchical
from benchsuite.topology.native import Topology as Native
from benchsuite.topology.parameter_server import Topology as ParameterServer
from benchsuite.topology.policy import ServerPolicy
from benchsuite.topology.ring import Topology as Ring
from benchsuite.worker.job import RankJob, write_rank_file
from benchsuite.worker.rendezvous import connect, open_store

WARMUP = 2
BLOCKS = 4  # blocks of updates, in which the two server loops take turns


def empty(job: RankJob) -> None:
    """Starts and ends."""
    write_rank_file(job.run_dir, job.rank, "{}")


def ring(job: RankJob) -> None:
    """Times three reductions in random order: `all_reduce`, `native` and `ring`.

    `all_reduce` is gloo's own sum, `native` the same with the division, so the mean, and `ring` the
    suite's mean.
    """
    comm = _connected(job)
    order = random.Random(job.cell["seed"])  # the same on every rank
    record: dict[str, list[int]] = {}
    native = Native()
    ours = Ring()
    native.start(comm)
    ours.start(comm)

    for size, repetitions in _sizes(job).items():
        x = torch.ones(size // 4)
        variants: dict[str, Callable[[Tensor], None]] = {
            "all_reduce": comm.all_reduce,
            "native": native.mean,
            "ring": ours.mean,
        }
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
    """The ns that the operation takes on this rank, from a barrier on."""
    comm.barrier()
    begin = time.perf_counter_ns()
    operation(x)
    return time.perf_counter_ns() - begin


def hierarchical(job: RankJob) -> None:
    """Times gloo's sum (`all_reduce`) and the mean through shared memory.

    The mean is taken of a vector that is `copied` in and out, and of one that lies there (`in
    place`).
    """
    comm = _connected(job)
    order = random.Random(job.cell["seed"])  # the same on every rank
    record: dict[str, list[int]] = {}
    ours = Hierarchical()
    ours.start(comm)

    for size, repetitions in _sizes(job).items():
        outside = torch.ones(size // 4)
        inside = ours.buffer(size // 4, like=outside)
        variants: dict[str, tuple[Callable[[Tensor], None], Tensor]] = {
            "all_reduce": (comm.all_reduce, outside),
            "copied": (ours.mean, outside),
            "in place": (ours.mean, inside),
        }
        names = sorted(variants)

        for repetition in range(WARMUP + repetitions):
            order.shuffle(names)
            for name in names:
                operation, x = variants[name]
                x.fill_(1.0)  # a sum in place would run away
                taken = _timed(comm, operation, x)
                if repetition >= WARMUP:
                    record.setdefault(f"{name} {size}", []).append(taken)

    write_rank_file(job.run_dir, job.rank, json.dumps(record))
    comm.barrier()


def server_profile(job: RankJob) -> None:
    """The ns of a server's loop in all, and in tickets, receiving, applying (`add_`) and sending.

    A worker leaves an empty record.
    """
    comm = _connected(job)
    ((size, updates),) = _sizes(job).items()
    topology = ParameterServer()
    topology.start(comm, num_servers=1)
    mine = torch.ones(size // 4)
    answer = torch.zeros(size // 4)
    profile: dict[str, int] = {}

    if topology.server < 0:
        comm.barrier()
        for update in range(updates):
            topology.exchange(mine, answer, tag=update)
        topology.goodbye()
    else:
        watched = _Watched(comm)
        topology._doors = [[watched]]  # the server's door is a comm whose calls are timed
        policy = _TimedPolicy()
        comm.barrier()
        begin = time.perf_counter_ns()
        topology.serve(
            mine, _no_updater, policy, samples_per_push=1, num_pushes=updates * topology.num_workers
        )
        total = time.perf_counter_ns() - begin
        profile = {**watched.spent, "apply": policy.spent, "total": total}

    write_rank_file(job.run_dir, job.rank, json.dumps(profile))
    comm.barrier()


class _Watched:
    """A comm that adds up how long its calls take."""

    def __init__(self, comm: ProcessComm) -> None:
        self._comm = comm
        self.spent = {"ticket": 0, "receive": 0, "send": 0}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def next_ticket(self) -> Any:
        return self._spend("ticket", self._comm.next_ticket)

    def recv(self, x: Tensor, src: int) -> Any:
        return self._spend("receive", self._comm.recv, x, src)

    def send(self, x: Tensor, dst: int) -> Any:
        return self._spend("send", self._comm.send, x, dst)

    def _spend(self, what: str, call: Callable[..., Any], *args: Any) -> Any:
        begin = time.perf_counter_ns()
        result = call(*args)
        self.spent[what] += time.perf_counter_ns() - begin
        return result


def server(job: RankJob) -> None:
    """Times an update of the suite's server loop (`tickets`) and of a plain one (`known order`).

    Rank 0 is the worker and rank 1 the server; each update is a push, `add_` and an answer. The
    plain loop knows the order of its pushes.
    """
    comm = _connected(job)
    record: dict[str, list[int]] = {}

    for size, updates in _sizes(job).items():
        topology = ParameterServer()
        topology.start(comm, num_servers=1)
        mine = torch.ones(size // 4)
        answer = torch.zeros(size // 4)
        count = -(-updates // BLOCKS)

        for block in range(2 * (BLOCKS + 1)):
            name = ("tickets", "known order")[block % 2]
            loop = _by_ticket if name == "tickets" else _in_order
            comm.barrier()
            begin = time.perf_counter_ns()
            loop(comm, topology, mine, answer, count)

            if block >= 2:  # the first block of each loop warms up
                record.setdefault(f"{name} {size}", []).append(
                    (time.perf_counter_ns() - begin) // count
                )

    write_rank_file(job.run_dir, job.rank, json.dumps(record))
    comm.barrier()


def _by_ticket(
    comm: ProcessComm, topology: ParameterServer, mine: Tensor, answer: Tensor, count: int
) -> None:
    """Makes `count` updates with the suite's loop, in which a ticket tells who has pushed."""
    if comm.rank == 0:
        for update in range(count):
            topology.exchange(mine, answer, tag=update)
        topology.goodbye()
    else:
        topology.serve(mine, _no_updater, AddAndAnswer(), samples_per_push=1, num_pushes=count)


def _in_order(
    comm: ProcessComm, topology: ParameterServer, mine: Tensor, answer: Tensor, count: int
) -> None:
    """Makes `count` updates with a loop that knows the order of its pushes."""
    for _ in range(count):
        if comm.rank == 0:
            receiving = comm.irecv(answer, 1)
            comm.send(mine, 1)
            receiving.wait()
        else:
            comm.recv(answer, 0)
            mine.add_(answer)
            comm.send(mine, 0)


class AddAndAnswer(ServerPolicy):
    """The cheapest policy, so that what is left is the loop and the wire."""

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


class _TimedPolicy(AddAndAnswer):
    """The cheapest policy, which adds up how long adding takes."""

    def __init__(self) -> None:
        self.spent = 0

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        begin = time.perf_counter_ns()
        answers = super().on_push(worker, version, flat)
        self.spent += time.perf_counter_ns() - begin
        return answers


def _no_updater() -> Any:
    raise AssertionError("this policy applies nothing")


def _connected(job: RankJob) -> ProcessComm:
    torch.set_num_threads(1)
    cell = from_json(job.cell)
    return connect(job, cell, open_store(job), None)


def _sizes(job: RankJob) -> dict[int, int]:
    """Size -> repetitions, as `selfcheck` wrote them into the run directory."""
    return {int(size): int(count) for size, count in read_order(job.run_dir).items()}
