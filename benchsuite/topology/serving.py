"""The one server loop of a parameter server, and its log: receive, let the policy decide, answer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchsuite.comm import ABANDONED, GOODBYE, Comm
from benchsuite.sync import ServerPolicy
from benchsuite.update import clip_factor

if TYPE_CHECKING:
    from benchsuite.topology.parameter_server import Topology as ParameterServer


class Steps(Protocol):
    """What a server applies with: `Updater`, or `Load` where it only averages."""

    def step(self, grad: Tensor, *, samples: int) -> None:
        """One step of the slice after so many samples of the budget."""


class ServerLog:
    """One row per push in the order of arrival, preallocated. Times are this server's clock in ns.

    `abandoned`: gradients that had been given up before this push came.
    """

    FIELDS = ("worker", "tag", "version_read", "version_before", "version_next", "sent_ns", "apply_ns", "done_ns",
              "abandoned")  # fmt: skip

    def __init__(self, num_pushes: int, num_workers: int) -> None:
        self._rows = np.full((max(num_pushes, 1), len(self.FIELDS)), -1, dtype=np.int64)
        self._claimed = 0
        self._lock = threading.Lock()
        self.version = 0  # optimiser steps done
        self.overlapped_replies = 0  # without lock: answers sent while another thread was applying
        self.replies = [0] * num_workers
        self.events: dict[str, int] = {}  # counts that the policy kept, e.g. drops
        self.num_abandoned = 0  # gradients given up because an answer came first
        self.abandoned_versions = 0  # sum over them: version read next minus version read
        self.first_read = [0] * num_workers
        self.last_read = [0] * num_workers
        # versions that a worker was given and has not sent a ticket for: the first is what its next ticket is about
        self._reads: list[deque[int]] = [deque([0]) for _ in range(num_workers)]
        self._open_row = [-1] * num_workers  # the worker's last push, unanswered
        self._waiting: list[deque[int]] | None = None  # per worker its pushes that are applied later, oldest first

    def push(self, worker: int, tag: int, sent_ns: int, now_ns: int) -> int:
        """Notes an arrival, returns its row."""
        with self._lock:
            row, self._claimed = self._claimed, self._claimed + 1
            if row >= len(self._rows):
                self._rows = np.concatenate([self._rows, np.full_like(self._rows, -1)])
        reads = self._reads[worker]
        read = reads.popleft() if reads else self.last_read[worker]
        answered = reads[0] if reads else -1  # its version was over, and its answer sent, before it came
        self._rows[row] = (worker, tag, read, self.version, answered, sent_ns, now_ns, -1, self.num_abandoned)
        self._open_row[worker] = row if answered < 0 else -1
        if self._waiting is not None:
            self._waiting[worker].append(row)
        return row

    def keep_waiting(self) -> None:
        """Pushes may be applied versions after their arrival: the policy says when (`applied`)."""
        self._waiting = [deque() for _ in self.replies]

    def version_of(self, row: int) -> int:
        """The version that a push was computed on."""
        return int(self._rows[row, 2])

    def abandoned(self, worker: int) -> None:
        """Notes that the worker gave its gradient up for an answer that it has got."""
        reads = self._reads[worker]
        self.num_abandoned += 1
        self.abandoned_versions += reads[1] - reads[0]
        reads.popleft()

    def left(self, worker: int) -> None:
        """Notes a goodbye: answers that crossed with it count as read."""
        reads = self._reads[worker]
        self.abandoned_versions += reads[-1] - reads[0] if reads else 0
        reads.clear()

    def answered(self, worker: int) -> None:
        """Notes that `worker` now holds the current version."""
        version = self.version  # read once: without lock another thread may be applying
        self.last_read[worker] = version
        self._reads[worker].append(version)
        self.replies[worker] += 1
        row = self._open_row[worker]
        if row >= 0:
            self._rows[row, 4] = version
            self._open_row[worker] = -1

    def done(self, row: int, now_ns: int) -> None:
        """Notes that the policy has taken the push."""
        self._rows[row, 7] = now_ns

    def applied(self, oldest_of: Sequence[int] = ()) -> None:
        """One optimiser step is done. oldest_of: workers whose oldest waiting push was in it."""
        for worker in oldest_of:
            assert self._waiting is not None
            self._rows[self._waiting[worker].popleft(), 3] = self.version
        with self._lock:
            self.version += 1

    @property
    def num_pushes(self) -> int:
        """Pushes taken so far."""
        return self._claimed

    @property
    def num_used(self) -> int:
        """Batches used so far: pushed, or begun and given up."""
        return self._claimed + self.num_abandoned

    def columns(self) -> dict[str, list[int]]:
        """The log as columns of plain integers."""
        taken = self._rows[: self._claimed]
        return {name: taken[:, position].tolist() for position, name in enumerate(self.FIELDS)}

    @property
    def staleness(self) -> list[int]:
        """Per push: version just before its apply minus version read."""
        taken = self._rows[: self._claimed]
        return list((taken[:, 3] - taken[:, 2]).tolist())


class ServerLoop:
    """State of one `serve`. Several threads may run it at once: then nothing but the log's counter is locked."""

    def __init__(
        self,
        topology: ParameterServer,
        shard: Tensor,
        make_updater: Callable[[], Steps],
        policy: ServerPolicy,
        *,
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
        self._first_updater: Any = None
        self._first_step = threading.Lock()
        self._applying = 0
        self.log = ServerLog(num_pushes, topology.num_workers)
        self.errors: list[BaseException] = []
        if getattr(policy, "applies_later", False):
            self.log.keep_waiting()
        policy.start(shard, self.apply)

    def close(self) -> None:
        """Lets go of the policy, which holds `apply`: a cycle would keep the comm's sockets until Python finds it."""
        del self._policy

    def guarded(self, comm: Comm) -> None:
        """Runs the loop in its thread; an error is kept for `serve` to raise."""
        try:
            self._run(comm)
        except BaseException as error:  # noqa: BLE001  the thread's outermost frame
            self.errors.append(error)

    def _run(self, comm: Comm) -> None:
        policy, log = self._policy, self.log
        local = {world: position for position, world in enumerate(comm.world_ranks)}
        names = [self._topology._comm.world_ranks.index(world) for world in comm.world_ranks]  # -> worker numbers
        buffer = torch.empty_like(self._shard)
        codec = self._topology.codec
        wire = buffer if codec is None else torch.empty(codec.num_bytes, dtype=torch.uint8)
        active = {worker for worker in names if worker < self._topology.num_workers}
        while active:
            source, tag, sent_ns = comm.next_ticket()
            worker = names[source]
            if worker not in active:
                continue  # lost before: its goodbye comes from whoever found it dead
            if tag == ABANDONED:
                log.abandoned(worker)
                continue
            if tag == GOODBYE or not self._reached(active, worker, partial(comm.recv, wire, source)):
                active.discard(worker)
                log.left(worker)
                answers = policy.on_goodbye(worker)
            else:
                row = log.push(worker, tag, sent_ns, comm.now_ns())
                if codec is not None and len(buffer):
                    codec.decode(wire, buffer)
                answers = policy.on_push(worker, log.version_of(row), buffer)
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
        """Does the transfer (nothing for an empty slice); False where the worker is lost and is survived."""
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

    def apply(self, gradient: Tensor, *, num_gradients: int = 1, oldest_of: Sequence[int] = ()) -> None:
        """One optimiser step on the shard; `num_gradients` pushes went into it. Version += 1."""
        samples = int((self.log.num_used - num_gradients) * self._samples_per_push)
        self._topology.settle(gradient)
        if self._clip_norm is not None:
            square = float(torch.dot(gradient, gradient))
            factor = clip_factor(self._topology.square_sum_over_servers(square) ** 0.5, self._clip_norm)
            if factor < 1.0:
                gradient.mul_(factor)
        self._count_applying(+1)
        self._step(gradient, max(samples, 0))
        self._count_applying(-1)
        self.log.applied(oldest_of)
        if self._on_update is not None:
            self._on_update(int(self.log.num_used * self._samples_per_push), self.log.version)

    def _step(self, gradient: Tensor, samples: int) -> None:
        """Each thread has an updater of its own; parameters and, from the first step on, state are shared."""
        updater: Any = getattr(self._updaters, "mine", None)
        if updater is None:
            updater = self._updaters.mine = self._make_updater()
            if self._topology.num_threads > 1:
                with self._first_step:
                    if self._first_updater is None:
                        updater.step(gradient, samples=samples)
                        self._first_updater = updater
                        return
                updater.share_state(self._first_updater)
        updater.step(gradient, samples=samples)

    def _count_applying(self, change: int) -> None:
        if self._topology.num_threads > 1:
            with self._first_step:
                self._applying += change
        else:
            self._applying += change
