"""Parameter server: the centralised synchronisation of the article's section 3.3.1 (Li et al. 2014, Dean et al. 2012).

S >= 1 own ranks, the last ones; server j owns slice j of the parameters and its optimiser state. A worker pushes
a gradient and is answered with parameters: M bytes and S messages each way per worker, N * M/S through each
server's port. Which pushes are applied when, and who is answered when, is all that a strategy decides, by its
`ServerPolicy`; the one server loop is here. A ticket goes ahead of each push, so that the server knows whom to
receive from: legal on every backend.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchsuite.comm import GOODBYE, Comm, Traffic
from benchsuite.sync import ServerPolicy
from benchsuite.topology import bounds
from benchsuite.update import Updater, clip_factor

CLIP_BYTES = 8  # one float64 between servers


@dataclass
class Topology:
    """Push, pull and the server loop."""

    payload_source = "counted"
    num_workers = 0
    num_servers = 1

    def start(self, comm: Comm, *, num_servers: int = 1) -> None:
        assert 0 < num_servers < comm.size, "rules: at least one server and one worker"
        self._comm = comm
        self.num_servers, self.num_workers = num_servers, comm.size - num_servers
        self.server = comm.rank - self.num_workers  # number of this server; negative on a worker
        self.use_threads(1)

    def use_threads(self, num_threads: int) -> None:
        """Serves with so many threads, each with its own group: worker w belongs to thread w % num_threads.

        Called by a strategy without lock on every rank, in its `start`. One thread uses the comm itself.
        """
        self.num_threads = num_threads
        self._doors: list[list[Comm | None]] = []  # [server][thread]
        for server in range(self.num_servers):
            if num_threads == 1:
                self._doors.append([self._comm])
                continue
            ranks = [[w for w in range(self.num_workers) if w % num_threads == t] for t in range(num_threads)]
            self._doors.append([self._comm.split([*workers, self.num_workers + server]) for workers in ranks])

    def buffer(self, numel: int, like: Tensor) -> Tensor:
        return torch.zeros(numel, dtype=like.dtype, device=like.device)

    def slice_of(self, server: int, numel: int) -> tuple[int, int]:
        """Range of the flat vector that `server` owns."""
        return bounds(numel, self.num_servers)[server]

    # -- worker ----------------------------------------------------------------------------------------------

    def exchange(self, push: Tensor, pull: Tensor, *, tag: int) -> None:
        """Sends `push` and receives the answer into `pull` (both whole vectors; they may be different ones).

        `tag` (>= 0) goes into the servers' push log: the number of the batch.
        """
        waiting = []
        for server, (start, stop) in enumerate(bounds(push.numel(), self.num_servers)):
            door, dst = self._door(server)
            if stop > start:
                waiting.append(door.irecv(pull[start:stop], dst))
            door.ticket(dst, tag)
            if stop > start:
                waiting.append(door.isend(push[start:stop], dst))
        for handle in waiting:
            handle.wait()

    def mean(self, flat: Tensor) -> None:
        """The mean of all workers' vectors (the servers' policy must be one that averages)."""
        self.exchange(flat, flat, tag=0)

    def goodbye(self) -> None:
        """Tells every server that this worker sends no more."""
        for server in range(self.num_servers):
            door, dst = self._door(server)
            door.ticket(dst, GOODBYE)

    def _door(self, server: int) -> tuple[Comm, int]:
        door = self._doors[server][self._comm.rank % self.num_threads if self.num_threads > 1 else 0]
        assert door is not None
        return door, (self.num_workers + server if self.num_threads == 1 else door.size - 1)

    # -- server ----------------------------------------------------------------------------------------------

    def serve(
        self,
        shard: Tensor,
        make_updater: Callable[[], Updater],
        policy: ServerPolicy,
        *,
        samples_per_push: float,
        num_pushes: int,
        clip_norm: float | None = None,
        on_update: Callable[[int, int], None] | None = None,
        survives: bool = False,
    ) -> ServerLog:
        """The one server loop; returns when every worker has said goodbye.

        `clip_norm` is given where the policy applies means: the norm is taken over all servers' slices.
        `on_update(samples, version)` is called after each optimiser step. `survives`: a worker whose connection
        breaks is taken as one that said goodbye.
        """
        loop = _Loop(self, shard, make_updater, policy, samples_per_push, num_pushes, clip_norm, on_update, survives)
        comms = [comm for comm in self._doors[self.server] if comm is not None and comm.size > 1]
        threads = [threading.Thread(target=loop.guarded, args=(comm,), daemon=True) for comm in comms[1:]]
        for thread in threads:
            thread.start()
        loop.guarded(comms[0])
        for thread in threads:
            thread.join()
        if loop.errors:
            raise loop.errors[0]
        return loop.log

    def square_sum_over_servers(self, value: float) -> float:
        """Sum of one float64 per server, added in server order: 2 (S-1) messages of 8 bytes."""
        if self.num_servers == 1:
            return value
        first, mine = self.num_workers, torch.tensor([value], dtype=torch.float64)
        if self.server > 0:
            self._comm.send(mine, first)
            self._comm.recv(mine, first)
            return float(mine)
        other = torch.empty(1, dtype=torch.float64)
        for rank in range(first + 1, self._comm.size):
            self._comm.recv(other, rank)
            mine.add_(other)
        for rank in range(first + 1, self._comm.size):
            self._comm.send(mine, rank)
        return float(mine)

    # -- costs -----------------------------------------------------------------------------------------------

    def predicted_traffic(self, numel: int, itemsize: int, *, num_workers: int, num_servers: int = 1) -> Traffic:
        """One exchange of every worker: 2 N M bytes in all."""
        ones = [1] * num_workers
        return push_pull_traffic(numel, itemsize, pushes=ones, replies=ones, num_servers=num_servers)


def push_pull_traffic(
    numel: int, itemsize: int, *, pushes: Sequence[int], replies: Sequence[int], num_servers: int
) -> Traffic:
    """Traffic of so many pushes and replies of each worker; an empty slice is not sent."""
    traffic, num_workers = Traffic(), len(pushes)
    for server, (start, stop) in enumerate(bounds(numel, num_servers)):
        for worker in range(num_workers):
            rank, num_bytes = num_workers + server, (stop - start) * itemsize
            if num_bytes and pushes[worker]:
                traffic.add(worker, rank, num_bytes * pushes[worker], pushes[worker])
            if num_bytes and replies[worker]:
                traffic.add(rank, worker, num_bytes * replies[worker], replies[worker])
    return traffic


def clip_traffic(num_workers: int, num_servers: int, times: int) -> Traffic:
    """The servers' agreement on the norm of a mean gradient, `times` times."""
    traffic = Traffic()
    for server in range(1, num_servers if times else 1):
        traffic.add(num_workers + server, num_workers, CLIP_BYTES * times, times)
        traffic.add(num_workers, num_workers + server, CLIP_BYTES * times, times)
    return traffic


class ServerLog:
    """One row per push in the order of arrival, preallocated. Times are this server's clock in ns."""

    FIELDS = ("worker", "tag", "version_read", "version_before", "version_next", "sent_ns", "apply_ns", "done_ns")

    def __init__(self, num_pushes: int, num_workers: int) -> None:
        self._rows = np.full((max(num_pushes, 1), len(self.FIELDS)), -1, dtype=np.int64)
        self._claimed = 0
        self._lock = threading.Lock()
        self.version = 0  # optimiser steps done
        self.overlapped_replies = 0  # without lock: answers sent while another thread was applying
        self.replies = [0] * num_workers
        self.drops = [0] * num_workers
        self.first_read = [0] * num_workers
        self.last_read = [0] * num_workers
        self._open_row = [-1] * num_workers  # the worker's last push, unanswered

    def push(self, worker: int, tag: int, sent_ns: int, now_ns: int) -> int:
        """Notes an arrival, returns its row."""
        with self._lock:
            row, self._claimed = self._claimed, self._claimed + 1
            if row >= len(self._rows):
                self._rows = np.concatenate([self._rows, np.full_like(self._rows, -1)])
        self._rows[row] = (worker, tag, self.last_read[worker], self.version, -1, sent_ns, now_ns, -1)
        self._open_row[worker] = row
        return row

    def answered(self, worker: int) -> None:
        """Notes that `worker` now holds the current version."""
        self.last_read[worker] = self.version
        self.replies[worker] += 1
        row = self._open_row[worker]
        if row >= 0:
            self._rows[row, 4] = self.version

    def done(self, row: int, now_ns: int) -> None:
        """Notes that the policy has taken the push."""
        self._rows[row, 7] = now_ns

    def applied(self) -> None:
        """One optimiser step is done."""
        with self._lock:
            self.version += 1

    @property
    def num_pushes(self) -> int:
        """Pushes taken so far."""
        return self._claimed

    def columns(self) -> dict[str, list[int]]:
        """The log as columns of plain integers."""
        taken = self._rows[: self._claimed]
        return {name: taken[:, position].tolist() for position, name in enumerate(self.FIELDS)}

    @property
    def staleness(self) -> list[int]:
        """Per push: version just before its apply minus version read."""
        taken = self._rows[: self._claimed]
        return list((taken[:, 3] - taken[:, 2]).tolist())


class _Loop:
    """State of one `serve`. Several threads may run it at once: then nothing but the log's counter is locked."""

    def __init__(
        self,
        topology: Topology,
        shard: Tensor,
        make_updater: Callable[[], Updater],
        policy: ServerPolicy,
        samples_per_push: float,
        num_pushes: int,
        clip_norm: float | None,
        on_update: Callable[[int, int], None] | None,
        survives: bool,
    ) -> None:
        self._topology, self._shard, self._policy = topology, shard, policy
        self._samples_per_push, self._clip_norm, self._on_update = samples_per_push, clip_norm, on_update
        self._survives = survives
        self._updaters = threading.local()
        self._make_updater = make_updater
        self._shared_state: Any = None
        self._first_step = threading.Lock()
        self._applying = 0
        self.log = ServerLog(num_pushes, topology.num_workers)
        self.errors: list[BaseException] = []
        policy.start(shard, self.apply)

    def guarded(self, comm: Comm) -> None:
        """Runs the loop in its thread; an error is kept for `serve` to raise."""
        try:
            self._run(comm)
        except BaseException as error:  # the thread's outermost frame
            self.errors.append(error)

    def _run(self, comm: Comm) -> None:
        policy, log = self._policy, self.log
        local = {world: position for position, world in enumerate(comm.world_ranks)}
        names = [self._topology._comm.world_ranks.index(world) for world in comm.world_ranks]  # -> worker numbers
        buffer = torch.empty_like(self._shard)
        active = {worker for worker in names if worker < self._topology.num_workers}
        while active:
            source, tag, sent_ns = comm.next_ticket()
            worker = names[source]
            if worker not in active:
                continue  # lost before: its goodbye comes from whoever found it dead
            if tag == GOODBYE or not self._reached(active, worker, lambda: comm.recv(buffer, source)):
                active.discard(worker)
                answers = policy.on_goodbye(worker)
            else:
                row = log.push(worker, tag, sent_ns, comm.now_ns())
                answers = policy.on_push(worker, log.last_read[worker], buffer)
                log.done(row, comm.now_ns())
            for answered in answers:
                self._answer(comm, active, answered, local[self._topology._comm.world_ranks[answered]])

    def _answer(self, comm: Comm, active: set[int], worker: int, dst: int) -> None:
        log = self.log
        log.answered(worker)
        started, applying = log.version, self._applying
        self._reached(active, worker, lambda: comm.send(self._policy.answer(worker), dst))
        if applying or self._applying or log.version != started:
            log.overlapped_replies += 1

    def _reached(self, active: set[int], worker: int, transfer: Callable[[], None]) -> bool:
        """Does the transfer (nothing for an empty slice); False where the worker is lost and the strategy survives it."""
        if not self._shard.numel():
            return True
        try:
            transfer()
        except RuntimeError:
            if not self._survives:
                raise
            active.discard(worker)
            return False
        return True

    def apply(self, gradient: Tensor, *, num_gradients: int = 1) -> None:
        """One optimiser step on the shard; `num_gradients` pushes went into it. Version += 1."""
        samples = int((self.log.num_pushes - num_gradients) * self._samples_per_push)
        if self._clip_norm is not None:
            square = float(torch.dot(gradient, gradient))
            factor = clip_factor(self._topology.square_sum_over_servers(square) ** 0.5, self._clip_norm)
            if factor < 1.0:
                gradient.mul_(factor)
        self._count_applying(+1)
        self._step(gradient, max(samples, 0))
        self._count_applying(-1)
        self.log.applied()
        if self._on_update is not None:
            self._on_update(int(self.log.num_pushes * self._samples_per_push), self.log.version)

    def _step(self, gradient: Tensor, samples: int) -> None:
        """Each thread has an updater of its own; parameters and, from the first step on, state are shared."""
        updater: Updater | None = getattr(self._updaters, "mine", None)
        if updater is None:
            updater = self._updaters.mine = self._make_updater()
        if self._shared_state is None:
            with self._first_step:
                if self._shared_state is None:
                    updater.step(gradient, samples=samples)
                    self._shared_state = updater.optimizer.state[updater.params[0]]
                    return
        if updater.optimizer.state.get(updater.params[0]) is not self._shared_state:
            updater.optimizer.state[updater.params[0]] = self._shared_state
        updater.step(gradient, samples=samples)

    def _count_applying(self, change: int) -> None:
        with self._first_step if self._topology.num_threads > 1 else nullcontext():
            self._applying += change
