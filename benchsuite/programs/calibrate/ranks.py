"""What the ranks of `benchsuite calibrate` do to measure messages.

Entries are `messages` of two ranks, `incast` of three and `shaped` of two. Each is called with a
job, connects as a worker does, does what `order.json` says and leaves lists of ns as its record.
What ranks do to measure computing is in `compute_ranks.py`.
"""

from __future__ import annotations

import contextlib
import json
from time import perf_counter_ns
from typing import Any

import torch

from benchsuite.comm.process import ProcessComm
from benchsuite.plan.cell import from_json
from benchsuite.programs.bench import read_order
from benchsuite.programs.shaped_link import BURST_BYTES, NotShaped, ShapedLoopback
from benchsuite.worker.job import RankJob, write_rank_file
from benchsuite.worker.rendezvous import connect, open_store

WARMUP = 3  # repetitions that are not kept
Times = dict[str, Any]


def messages(job: RankJob) -> None:
    """Times messages of two ranks by size, and the controls of `_controls`.

    `one_way` is half of a round trip, with one message under way at a time; for `both_ways` each
    rank sends and receives at once. Receives are posted ahead, as the suite's topologies do. Order:
    {"sizes": {bytes: repetitions}, "controls": n}.
    """
    comm = connected(job)
    order = read_order(job.run_dir)
    record: Times = {"one_way": {}, "both_ways": {}}

    for size, repetitions in order["sizes"].items():
        record["one_way"][size] = _one_way(comm, int(size), repetitions)
        comm.barrier()
        record["both_ways"][size] = _both_ways(comm, int(size), repetitions)
        comm.barrier()

    record |= _controls(comm, order["controls"])
    leave(job, comm, record)


def _one_way(comm: ProcessComm, size: int, repetitions: int, warmup: int = WARMUP) -> list[int]:
    """Half of each round trip in ns, measured on rank 0; rank 1 answers."""
    mine = torch.ones(size // 4)
    theirs = torch.zeros(size // 4)
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
    """The ns of each exchange, in which this rank sends and receives at once."""
    mine = torch.ones(size // 4)
    theirs = torch.zeros(size // 4)
    other = 1 - comm.rank
    times = []

    for repetition in range(WARMUP + repetitions):
        begin = perf_counter_ns()
        receiving = comm.irecv(theirs, other)
        sending = comm.isend(mine, other)
        receiving.wait()
        sending.wait()
        if repetition >= WARMUP:
            times.append(perf_counter_ns() - begin)

    return times


def _controls(comm: ProcessComm, repetitions: int) -> Times:
    """Times the small calls with which a worker and a server agree.

    On rank 0 these are `ticket_call`, what sending a ticket costs, and `counter`, one fetch_add. On
    rank 1 it is `ticket`, the time until the ticket came.
    """
    calls = []
    arrivals = []
    counters = []

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
            arrivals.append(perf_counter_ns() - sent_ns)  # both ranks read the clock of one host
            comm.ticket(0, repetition)

    return {
        "ticket_call": calls[WARMUP:],
        "ticket": arrivals[WARMUP:],
        "counter": counters[WARMUP:],
    }


def incast(job: RankJob) -> None:
    """Times two messages to rank 0: `at_once`, sent together by ranks 1 and 2, and `in_turn`.

    Each message is sent when a word of 4 bytes from the receiver asks for it. Order: {"sizes":
    {bytes: repetitions}}.
    """
    comm = connected(job)
    order = read_order(job.run_dir)
    record: Times = {"at_once": {}, "in_turn": {}}

    for size, repetitions in order["sizes"].items():
        numel = int(size) // 4
        for repetition in range(WARMUP + repetitions):
            for name in ("at_once", "in_turn"):
                taken = _gather(comm, numel, together=name == "at_once")
                if repetition >= WARMUP and comm.rank == 0:
                    record[name].setdefault(size, []).append(taken)

    leave(job, comm, record)


def _gather(comm: ProcessComm, numel: int, *, together: bool) -> int:
    """The ns in which rank 0 receives a vector from each of the others; 0 on the others."""
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


def shaped(job: RankJob) -> None:
    """Times `one_way` by rate and size over a slow link, or leaves the `reason` why there is none.

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
            store.get(
                f"seen by {1 - job.rank}"
            )  # rank 0 hosts the store, so it stays until the other has read
            return

        comm = connected(job, store)  # only now do packets have their size
        record: Times = {"reason": None, "one_way": {}}

        for rate, sizes in read_order(job.run_dir)["rates"].items():
            comm.barrier()
            if isinstance(link, ShapedLoopback):
                link.set_rate(float(rate))
            comm.barrier()
            _one_way(comm, 2 * BURST_BYTES, 1, warmup=0)  # empties the bucket of the traffic shaper
            record["one_way"][rate] = {
                size: _one_way(comm, int(size), repetitions, warmup=1)
                for size, repetitions in sizes.items()
            }

        comm.barrier()
        if isinstance(link, ShapedLoopback):
            link.set_rate(None)
        leave(job, comm, record)


def _slow_link(job: RankJob, stack: contextlib.ExitStack) -> ShapedLoopback | str:
    """The shaped link, which `stack` puts back at its end, or the reason why there is none."""
    link = ShapedLoopback(private_network=job.private_network, network_reason=job.network_reason)

    try:
        return stack.enter_context(link)
    except NotShaped as reason:
        return str(reason)


def connected(job: RankJob, store: Any = None) -> ProcessComm:
    """Connects as a worker does, with one thread."""
    torch.set_num_threads(1)
    return connect(job, from_json(job.cell), open_store(job) if store is None else store, None)


def leave(job: RankJob, comm: ProcessComm, record: Times) -> None:
    """Hands the record in, and stays until no peer needs the store any more."""
    write_rank_file(job.run_dir, job.rank, json.dumps(record))
    comm.barrier()
