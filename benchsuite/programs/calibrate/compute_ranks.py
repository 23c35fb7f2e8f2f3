"""What the ranks of `benchsuite calibrate` do to measure computing.

Entries are `additions` and `gradients`, of one rank each, and `steps` of two. A step is the one of
the cell's workload without strategy and harness: batch, gradient, messages, update. Each entry does
what `order.json` says and leaves lists of ns as its record.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from time import perf_counter_ns

import torch

from benchsuite.comm.process import ProcessComm
from benchsuite.plan.cell import from_json
from benchsuite.programs.bench import read_order
from benchsuite.programs.calibrate.ranks import WARMUP, Times, connected, leave
from benchsuite.update import Updater
from benchsuite.worker import setup
from benchsuite.worker.job import RankJob, write_rank_file
from benchsuite.worker.rollouts import Batches
from benchsuite.workload import Part, Recipe, Workload

# Batch sizes and kinds of steps take turns in so many blocks, so that a slow spell of the machine
# meets all of them.
BLOCKS = 4


def additions(job: RankJob) -> None:
    """Times `x.add_(y)`, which is what a receiver does with a vector that has come.

    Order: {"sizes": {bytes: repetitions}}.
    """
    _quiet_torch()
    record: Times = {"add": {}}

    for size, repetitions in read_order(job.run_dir)["sizes"].items():
        x = torch.zeros(int(size) // 4)
        y = torch.ones(int(size) // 4)
        times = record["add"][size] = []

        for repetition in range(WARMUP + repetitions):
            begin = perf_counter_ns()
            x.add_(y)
            if repetition >= WARMUP:
                times.append(perf_counter_ns() - begin)

    write_rank_file(job.run_dir, job.rank, json.dumps(record))


class _Step:
    """Steps of the cell's workload without strategy and harness: batch, gradient, update."""

    def __init__(self, job: RankJob) -> None:
        cell = from_json(job.cell)
        self._workload: Workload
        self._part: Part
        self._workload, self._part = setup.build_part(cell)
        self._recipe: Recipe = setup.make_recipe(cell, self._workload)
        self._updater = Updater(self._part.params, self._recipe, shapes=self._part.shapes)
        self._number = 0
        # (shard, number of shards) -> batches: an agent has environments of its own for each share.
        self._batches: dict[tuple[int, int], Batches] = {}
        self.vector_bytes = self._part.grad.numel() * self._part.grad.element_size()

    def run(
        self, batch: int, *, shard: int = 0, between: Callable[[], None] = lambda: None
    ) -> tuple[int, int]:
        """Makes one step on so many samples; returns (ns of the gradient, ns of the whole step).

        `between` is called after the gradient and before the update.
        """
        num_shards = self._recipe.global_batch // batch
        begin = perf_counter_ns()
        batches = self._batches.setdefault((shard, num_shards), Batches(self._workload))
        samples = batches.fetch((self._number, shard, num_shards), self._part.infer)
        before = perf_counter_ns()
        self._part.gradient(samples)
        after = perf_counter_ns()
        between()
        self._updater.step(self._part.grad, samples=0)
        self._number += 1
        return after - before, perf_counter_ns() - begin


def gradients(job: RankJob) -> None:
    """Times `gradient` and `step` (batch, gradient, update) by batch size.

    The record also holds `vector_bytes`, the size of a gradient. Order: {"batches": {samples:
    repetitions}, "seconds": about how long a batch size may take}.
    """
    _quiet_torch()
    step = _Step(job)
    order = read_order(job.run_dir)
    batches = order["batches"]
    seconds = order["seconds"]
    record: Times = {
        "gradient": {batch: [] for batch in batches},
        "step": {batch: [] for batch in batches},
    }
    record["vector_bytes"] = step.vector_bytes

    for _ in range(BLOCKS):
        for batch, repetitions in batches.items():
            end = perf_counter_ns() + int(1e9 * seconds / BLOCKS)
            for repetition in range(WARMUP + -(-repetitions // BLOCKS)):
                if repetition > WARMUP and perf_counter_ns() > end:
                    break
                gradient, whole = step.run(int(batch))

                if repetition >= WARMUP:
                    record["gradient"][batch].append(gradient)
                    record["step"][batch].append(whole)

    write_rank_file(job.run_dir, job.rank, json.dumps(record))


def steps(job: RankJob) -> None:
    """Times steps that send messages between gradient and update, in three ways.

    `both`: two ranks compute, then send and receive `both_bytes` at once. `twice`: they do so a
    second time. `one`: rank 0 computes, rank 1 waits and answers a message of `one_bytes` with
    another.

    A rank has two threads, its own and gloo's, and after computing the latter waits for a core;
    ranks share the machine's cores here. Messages that are timed alone do not show that.

    Order: {"rounds": n, "both_batch": samples, "both_bytes": n, "one_batch": samples, "one_bytes":
    n}; without `both_batch` the first two ways are left out.
    """
    comm = connected(job)
    order = read_order(job.run_dir)
    _quiet_torch()
    step = _Step(job)
    record: Times = {
        f"{name}_{part}": [] for name in ("both", "twice", "one") for part in ("gradient", "step")
    }
    count = -(-order["rounds"] // BLOCKS)

    for _ in range(BLOCKS):
        if order["both_batch"]:
            _exchanging(comm, step, record, "both", order, count)
            _exchanging(comm, step, record, "twice", order, count)
        _answered(comm, step, record, order, count)

    leave(job, comm, record)


def _exchanging(
    comm: ProcessComm, step: _Step, record: Times, name: str, order: Times, count: int
) -> None:
    """Steps of two ranks that compute and then exchange messages, once or twice."""
    other = 1 - comm.rank
    numel = order["both_bytes"] // 4
    times = 2 if name == "twice" else 1
    mine = torch.ones(numel)
    theirs = torch.zeros(numel)

    def exchange() -> None:
        for _ in range(times):
            receiving = comm.irecv(theirs, other)
            sending = comm.isend(mine, other)
            receiving.wait()
            sending.wait()

    comm.barrier()

    for repetition in range(WARMUP + count):
        gradient, whole = step.run(order["both_batch"], shard=comm.rank, between=exchange)
        if repetition >= WARMUP:
            record[f"{name}_gradient"].append(gradient)
            record[f"{name}_step"].append(whole)


def _answered(comm: ProcessComm, step: _Step, record: Times, order: Times, count: int) -> None:
    """Steps of rank 0, which asks rank 1 for an answer as a worker asks its server."""
    numel = order["one_bytes"] // 4
    mine = torch.ones(numel)
    theirs = torch.zeros(numel)

    def ask() -> None:
        receiving = comm.irecv(theirs, 1)
        comm.send(mine, 1)
        receiving.wait()

    comm.barrier()

    for repetition in range(WARMUP + count):
        if comm.rank == 1:
            comm.recv(theirs, 0)
            comm.send(mine, 0)
            continue

        gradient, whole = step.run(order["one_batch"], between=ask)

        if repetition >= WARMUP:
            record["one_gradient"].append(gradient)
            record["one_step"].append(whole)


def _quiet_torch() -> None:
    """Sets torch as a worker does."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
