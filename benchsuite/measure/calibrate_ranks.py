"""What the ranks of `benchsuite calibrate` do: messages, incast, additions, gradients, steps, messages over slow links.

Each entry is called with a job, connects as a worker does, does what `order.json` says and leaves lists of ns as its
record. Entries: `messages` (2 ranks), `incast` (3), `additions` (1), `gradients` (1), `steps` (2), `shaped` (2).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

import torch

from benchsuite import cell as cells
from benchsuite import training as trainings
from benchsuite.comm.process import ProcessComm
from benchsuite.comm.rendezvous import connect, open_store
from benchsuite.job import RankJob, write_rank_file
from benchsuite.measure.bench import read_order
from benchsuite.measure.shaped_link import BURST_BYTES, NotShaped, ShapedLoopback
from benchsuite.update import Updater
from benchsuite.workload import Part, Recipe, Workload

WARMUP = 3  # repetitions that are not kept
BLOCKS = 4  # batch sizes take turns, so that a slow spell of the machine meets all of them
Times = dict[str, Any]


def messages(job: RankJob) -> None:
    """`one_way` (half a round trip, one message under way), `both_ways` (each sends and receives at once); controls.

    Order: {"sizes": {bytes: repetitions}, "controls": n}. Receives are posted ahead, as our topologies do.
    """
    comm, order = _connected(job), read_order(job.run_dir)
    record: Times = {"one_way": {}, "both_ways": {}}
    for size, repetitions in order["sizes"].items():
        record["one_way"][size] = _one_way(comm, int(size), repetitions)
        comm.barrier()
        record["both_ways"][size] = _both_ways(comm, int(size), repetitions)
        comm.barrier()
    record |= _controls(comm, order["controls"])
    _leave(job, comm, record)


def _one_way(comm: ProcessComm, size: int, repetitions: int, warmup: int = WARMUP) -> list[int]:
    """On rank 0: half of each round trip. Rank 1 answers."""
    mine, theirs = torch.ones(size // 4), torch.zeros(size // 4)
    times = []
    receiving = comm.irecv(theirs, 1 - comm.rank)
    for repetition in range(warmup + repetitions):
        begin = perf_counter_ns()
        if comm.rank == 0:
            comm.send(mine, 1)
        receiving.wait()
        if repetition + 1 < warmup + repetitions:
            receiving = comm.irecv(theirs, 1 - comm.rank)
        if comm.rank == 1:
            comm.send(mine, 0)
        elif repetition >= warmup:
            times.append((perf_counter_ns() - begin) // 2)
    return times


def _both_ways(comm: ProcessComm, size: int, repetitions: int) -> list[int]:
    mine, theirs, other = torch.ones(size // 4), torch.zeros(size // 4), 1 - comm.rank
    times = []
    for repetition in range(WARMUP + repetitions):
        begin = perf_counter_ns()
        receiving, sending = comm.irecv(theirs, other), comm.isend(mine, other)
        receiving.wait()
        sending.wait()
        if repetition >= WARMUP:
            times.append(perf_counter_ns() - begin)
    return times


def _controls(comm: ProcessComm, repetitions: int) -> Times:
    """Rank 0: `ticket_call` (what sending a ticket costs), `counter` (fetch_add). Rank 1: `ticket`, until it came."""
    calls, arrivals, counters = [], [], []
    for repetition in range(WARMUP + repetitions):
        if comm.rank == 0:
            begin = perf_counter_ns()
            comm.ticket(1, repetition)
            called = perf_counter_ns()
            comm.next_ticket()
            before = perf_counter_ns()
            comm.fetch_add("calibrate", 1)
            calls.append(called - begin)
            counters.append(perf_counter_ns() - before)
        else:
            _, _, sent_ns = comm.next_ticket()
            arrivals.append(perf_counter_ns() - sent_ns)  # one host, one clock
            comm.ticket(0, repetition)
    return {"ticket_call": calls[WARMUP:], "ticket": arrivals[WARMUP:], "counter": counters[WARMUP:]}


def incast(job: RankJob) -> None:
    """On rank 0: `at_once`, two messages that ranks 1 and 2 send together; `in_turn`, one after the other.

    Order: {"sizes": {bytes: repetitions}}. Each begins with a word of 4 bytes from the receiver.
    """
    comm, order = _connected(job), read_order(job.run_dir)
    record: Times = {"at_once": {}, "in_turn": {}}
    for size, repetitions in order["sizes"].items():
        numel = int(size) // 4
        for repetition in range(WARMUP + repetitions):
            for name in ("at_once", "in_turn"):
                taken = _gather(comm, numel, together=name == "at_once")
                if repetition >= WARMUP and comm.rank == 0:
                    record[name].setdefault(size, []).append(taken)
    _leave(job, comm, record)


def _gather(comm: ProcessComm, numel: int, *, together: bool) -> int:
    """Rank 0 receives a vector from each of the others; ns on rank 0."""
    word = torch.zeros(1)
    if comm.rank != 0:
        mine = torch.ones(numel)
        comm.recv(word, 0)
        comm.send(mine, 0)
        return 0
    senders = range(1, comm.size)
    theirs = [torch.zeros(numel) for _ in senders]
    begin = perf_counter_ns()
    receiving = [comm.irecv(vector, sender) for sender, vector in zip(senders, theirs, strict=True)]
    for sender, handle in zip(senders, receiving, strict=True):
        comm.send(word, sender)
        if not together:
            handle.wait()
    if together:
        for handle in receiving:
            handle.wait()
    return perf_counter_ns() - begin


def additions(job: RankJob) -> None:
    """ns of `x.add_(y)`, what a receiver does with what has come. Order: {"sizes": {bytes: repetitions}}."""
    _quiet_torch()
    record: Times = {"add": {}}
    for size, repetitions in read_order(job.run_dir)["sizes"].items():
        x, y = torch.zeros(int(size) // 4), torch.ones(int(size) // 4)
        times = record["add"][size] = []
        for repetition in range(WARMUP + repetitions):
            begin = perf_counter_ns()
            x.add_(y)
            if repetition >= WARMUP:
                times.append(perf_counter_ns() - begin)
    write_rank_file(job.run_dir, job.rank, json.dumps(record))


class _Step:
    """Batch, gradient, update of the cell's workload without strategy and harness."""

    def __init__(self, job: RankJob) -> None:
        cell = cells.from_json(job.cell)
        self._workload: Workload
        self._part: Part
        self._workload, self._part = trainings.build_part(cell)
        self._recipe: Recipe = trainings.make_recipe(cell, self._workload)
        self._updater = Updater(self._part.params, self._recipe)
        self._number = 0
        self.vector_bytes = self._part.grad.numel() * self._part.grad.element_size()

    def run(self, batch: int, *, shard: int = 0, between: Callable[[], None] = lambda: None) -> tuple[int, int]:
        """(ns of the gradient, ns of all) of one step on so many samples; between: gradient and update."""
        num_shards = self._recipe.global_batch // batch
        begin = perf_counter_ns()
        samples = self._workload.batch(self._number, shard=shard, num_shards=num_shards)
        before = perf_counter_ns()
        self._part.gradient(samples)
        after = perf_counter_ns()
        between()
        self._updater.step(self._part.grad, samples=0)
        self._number += 1
        return after - before, perf_counter_ns() - begin


def gradients(job: RankJob) -> None:
    """`gradient` and `step` (batch, gradient, update) by batch size, and `vector_bytes` of a gradient.

    Order: {"batches": {samples: repetitions}, "seconds": about how long a batch size may take}.
    """
    _quiet_torch()
    step, order = _Step(job), read_order(job.run_dir)
    batches, seconds = order["batches"], order["seconds"]
    record: Times = {"gradient": {batch: [] for batch in batches}, "step": {batch: [] for batch in batches}}
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
    """Steps with one exchange between gradient and update, in the two ways in which ranks share a machine's cores.

    `both`: two ranks compute, then send and receive `both_bytes` at once. `one`: rank 0 computes, rank 1 waits and
    answers a message of `one_bytes` with another. Order: {"rounds": n, "both_batch": samples, "both_bytes": n,
    "one_batch": samples, "one_bytes": n}; without `both_batch` the first is left out.
    A rank has two threads, its own and gloo's; after computing, the latter waits for a core. Messages that are timed
    alone know nothing of that.
    """
    comm, order = _connected(job), read_order(job.run_dir)
    _quiet_torch()
    step, other = _Step(job), 1 - comm.rank
    record: Times = {name: [] for name in ("both_gradient", "both_step", "one_gradient", "one_step")}
    for name in ("both", "one"):
        if not order[f"{name}_batch"]:
            continue
        numel, batch = order[f"{name}_bytes"] // 4, order[f"{name}_batch"]
        mine, theirs = torch.ones(numel), torch.zeros(numel)

        def exchange(mine: torch.Tensor = mine, theirs: torch.Tensor = theirs) -> None:
            receiving, sending = comm.irecv(theirs, other), comm.isend(mine, other)
            receiving.wait()
            sending.wait()

        comm.barrier()
        for repetition in range(WARMUP + order["rounds"]):
            if name == "one" and comm.rank == 1:
                comm.recv(theirs, 0)
                comm.send(mine, 0)
                continue
            gradient, whole = step.run(batch, shard=comm.rank if name == "both" else 0, between=exchange)
            if repetition >= WARMUP:
                record[f"{name}_gradient"].append(gradient)
                record[f"{name}_step"].append(whole)
    _leave(job, comm, record)


def shaped(job: RankJob) -> None:
    """`one_way` by rate and size over a slow link; `reason` where there is none.

    Order: {"rates": {Mbit/s: {bytes: repetitions}}}.
    """
    store = open_store(job)
    with contextlib.ExitStack() as stack:
        link = _slow_link(job, stack) if job.rank == 0 else None
        if job.rank == 0:
            store.set("shaped", link if isinstance(link, str) else "")
        reason = store.get("shaped").decode()
        if reason:
            write_rank_file(job.run_dir, job.rank, json.dumps({"reason": reason, "one_way": {}}))
            store.set(f"seen by {job.rank}", "")
            store.get(f"seen by {1 - job.rank}")  # rank 0 hosts the store
            return
        comm = _connected(job, store)  # after the packets have got their size
        record: Times = {"reason": None, "one_way": {}}
        for rate, sizes in read_order(job.run_dir)["rates"].items():
            comm.barrier()
            if isinstance(link, ShapedLoopback):
                link.set_rate(float(rate))
            comm.barrier()
            _one_way(comm, 2 * BURST_BYTES, 1, warmup=0)  # empties the bucket
            record["one_way"][rate] = {
                size: _one_way(comm, int(size), repetitions, warmup=1) for size, repetitions in sizes.items()
            }
        comm.barrier()
        if isinstance(link, ShapedLoopback):
            link.set_rate(None)
        _leave(job, comm, record)


def _slow_link(job: RankJob, stack: contextlib.ExitStack) -> ShapedLoopback | str:
    """The link, which `stack` puts back; else why there is none."""
    link = ShapedLoopback(private_network=job.private_network, network_reason=job.network_reason)
    try:
        return stack.enter_context(link)
    except NotShaped as reason:
        return str(reason)


def _quiet_torch() -> None:
    """As a worker sets it."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property


def _connected(job: RankJob, store: Any = None) -> ProcessComm:
    torch.set_num_threads(1)
    return connect(job, cells.from_json(job.cell), open_store(job) if store is None else store, None)


def _leave(job: RankJob, comm: ProcessComm, record: Times) -> None:
    write_rank_file(job.run_dir, job.rank, json.dumps(record))
    comm.barrier()
