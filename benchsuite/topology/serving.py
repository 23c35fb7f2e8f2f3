"""The one server loop of a parameter server: receive, let the policy decide, answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from benchsuite.comm import ABANDONED, GOODBYE, Comm, Handle
from benchsuite.comm.codec import Codec
from benchsuite.topology.policy import ServerPolicy, Steps
from benchsuite.topology.server_log import ServerLog
from benchsuite.update import clip_factor


class ServedTopology(Protocol):
    """What the server loop asks of its topology."""

    num_workers: int
    num_threads: int
    push_bytes: int
    world_ranks: Sequence[int]  # of the ranks of the topology, workers first

    @property
    def codec(self) -> Codec | None:
        """Of this server's slice; None where pushes come as they are."""

    def settle(self, mean: Tensor) -> None:
        """What becomes of a mean of pushes before it is applied, in place."""

    def square_sum(self, gradient: Tensor) -> float:
        """Of the whole mean gradient, of which `gradient` is this server's slice."""


class _Inbox:
    """What a server's thread receives pushes into: small ones before their tickets come
    (`Comm.early_bytes`).
    """

    def __init__(self, comm: Comm, shard: Tensor, codec: Codec | None, *, push_bytes: int) -> None:
        self._comm = comm
        self._codec = codec
        self._decoded = torch.empty_like(shard)
        self._empty = not shard.numel()
        wire_bytes = push_bytes if codec is None else codec.num_bytes
        self._late = torch.empty(wire_bytes, dtype=torch.uint8) if wire_bytes else self._decoded
        self._early = 0 < self._late.numel() * self._late.element_size() <= comm.early_bytes
        self._wires: dict[int, Tensor] = {}
        self._open: dict[int, Handle] = {}  # receives that are under way

    def expect(self, source: int) -> None:
        """Posts the receive of the next push of `source`, where that is done before its ticket."""
        if self._early:
            wire = self._wires.setdefault(source, torch.empty_like(self._late))
            self._open[source] = self._comm.irecv(wire, source)

    def take(self, source: int) -> None:
        """Receives the push of which a ticket came (nothing of an empty slice)."""
        if self._early:
            if (
                source not in self._open
            ):  # it could not be posted: the connection was broken, and says so here
                self.expect(source)

            self._open.pop(source).wait()
        elif not self._empty:
            self._comm.recv(self._late, source)

    def push(self, source: int) -> Tensor:
        """The push just taken, decoded: the caller's until the next `expect` or `take`."""
        wire = self._wires.get(source, self._late)
        if self._codec is None:
            return wire

        if not self._empty:
            self._codec.decode(wire, self._decoded)

        return self._decoded

    def close(self, source: int) -> None:
        """Receives the farewell of a worker that sends no more: no receive may be left over for a
        later message.
        """
        if source in self._open:
            self._open.pop(source).wait()
        elif self._comm.early_bytes:
            self._comm.recv(torch.empty(1, dtype=torch.uint8), source)


class ServerLoop:
    """State of one `serve`. Several threads may run it at once: then nothing but the log's counter
    is locked.
    """

    def __init__(
        self,
        topology: ServedTopology,
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
        self._topology = topology
        self._shard = shard
        self._policy = policy
        self._samples_per_push = samples_per_push
        self._clip_norm = clip_norm
        self._on_update = on_update
        self._survives = survives
        self._several_steps = policy.several_steps
        self._updaters = threading.local()
        self._make_updater = make_updater
        self._first_updater: Any = None
        self._first_step = threading.Lock()
        self._applying = 0
        self.log = ServerLog(num_pushes, topology.num_workers)
        self.errors: list[BaseException] = []
        if policy.applies_later:
            self.log.keep_waiting()

        self.log.read_ahead(policy.reads_ahead)
        policy.start(shard, self.apply)

    def close(self) -> None:
        """Lets go of the policy, which holds `apply`: a cycle would keep the comm's sockets until
        Python finds it.
        """
        del self._policy

    def guarded(self, comm: Comm) -> None:
        """Runs the loop in its thread; an error is kept for `serve` to raise."""
        try:
            self._run(comm)
        except BaseException as error:  # noqa: BLE001  the thread's outermost frame
            self.errors.append(error)

    def _run(self, comm: Comm) -> None:
        policy = self._policy
        log = self.log
        local = {world: position for position, world in enumerate(comm.world_ranks)}
        names = [
            self._topology.world_ranks.index(world) for world in comm.world_ranks
        ]  # -> worker numbers
        active = {worker for worker in names if worker < self._topology.num_workers}
        inbox = _Inbox(
            comm, self._shard, self._topology.codec, push_bytes=self._topology.push_bytes
        )

        for position, worker in enumerate(names):
            if worker in active:
                self._reached(partial(inbox.expect, position))

        while active:
            source, tag, sent_ns = comm.next_ticket()
            worker = names[source]
            if worker not in active:
                continue  # found lost before: this goodbye comes from whoever found it dead

            if tag == ABANDONED:
                log.abandoned(worker)
                continue

            if tag == GOODBYE or not self._reached(partial(inbox.take, source)):
                self._reached(partial(inbox.close, source))
                active.discard(worker)
                log.left(worker)
                answers = policy.on_goodbye(worker)
            else:
                row = log.push(worker, tag, sent_ns, comm.now_ns())
                answers = policy.on_push(worker, log.version_of(row), inbox.push(source))
                log.done(row, comm.now_ns())
                if self._several_steps:
                    self._tell_update()

                self._reached(partial(inbox.expect, source))

            for answered in answers:
                self._answer(comm, answered, local[self._topology.world_ranks[answered]])

    def _answer(self, comm: Comm, worker: int, dst: int) -> None:
        log = self.log
        log.answered(worker)
        started = log.version
        applying = self._applying
        if self._shard.numel():
            self._reached(partial(comm.send, self._policy.answer(worker), dst))

        if applying or self._applying or log.version != started:
            log.overlapped_replies += 1

    def _reached(self, transfer: Callable[[], None]) -> bool:
        """Does the transfer; False where the worker is lost and is survived: somebody will say its
        goodbye.
        """
        try:
            transfer()
        except RuntimeError:
            if not self._survives:
                raise

            return False

        return True

    def apply(
        self, gradient: Tensor, *, num_gradients: int = 1, oldest_of: Sequence[int] = ()
    ) -> None:
        """One optimiser step on the shard; `num_gradients` pushes went into it. Version += 1."""
        samples = int((self.log.num_used - num_gradients) * self._samples_per_push)
        self._topology.settle(gradient)
        if self._clip_norm is not None:
            factor = clip_factor(self._topology.square_sum(gradient) ** 0.5, self._clip_norm)
            if factor < 1.0:
                gradient.mul_(factor)

        self._count_applying(+1)
        self._step(gradient, max(samples, 0))
        self._count_applying(-1)
        self.log.applied(oldest_of)
        if not self._several_steps:
            self._tell_update()

    def _tell_update(self) -> None:
        if self._on_update is not None:
            self._on_update(int(self.log.num_used * self._samples_per_push), self.log.version)

    def _step(self, gradient: Tensor, samples: int) -> None:
        """Each thread has an updater of its own; parameters and, from the first step on, state are
        shared.
        """
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
