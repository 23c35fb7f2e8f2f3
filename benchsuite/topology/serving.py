"""The one server loop of a parameter server: receive a push, let the policy decide, answer.

A ticket of a few bytes comes ahead of every push and says from whom. The loop receives the push,
notes it in the log, gives it to the strategy's `ServerPolicy`, and answers those whom the policy
names. It also makes the optimiser steps that the policy asks for: settle, clip, step, version += 1.

Without a lock (`asynchronous` with lock = none) several threads run the loop at once on the same
slice, each with its own workers; torn reads and lost updates are then what is measured.
"""

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
    """What the server loop asks of its topology (`topology/parameter_server.py`)."""

    num_workers: int
    num_threads: int

    push_bytes: int
    """Bytes of a push that is no slice of a vector; 0 = pushes are slices."""

    world_ranks: Sequence[int]
    """World ranks of the ranks of the topology, workers first."""

    @property
    def codec(self) -> Codec | None:
        """The codec of this server's slice; None where pushes come as they are."""

    def settle(self, mean: Tensor) -> None:
        """Changes a mean of pushes before it is applied, in place."""

    def square_sum(self, gradient: Tensor) -> float:
        """Sums the squares of the whole mean gradient, of which `gradient` is this slice."""


class _Inbox:
    """What a server's thread receives pushes into.

    Small pushes are received early: their receives are posted before their tickets come, into one
    vector per worker, because several may come at once (`Comm.early_bytes` says up to which size
    that is faster). Large ones are received after their tickets, all into the same vector.
    """

    def __init__(self, comm: Comm, shard: Tensor, codec: Codec | None, *, push_bytes: int) -> None:
        """`shard` is the slice that pushes are about; `push_bytes` > 0: they have that size."""
        self._comm = comm
        self._codec = codec

        # Where a push is decoded to, or received into if it is a slice as it is.
        self._decoded = torch.empty_like(shard)
        self._empty = not shard.numel()

        # A push is a slice as it is, or bytes: an encoded slice, or what the strategy sends.
        wire_bytes = push_bytes if codec is None else codec.num_bytes
        self._late = torch.empty(wire_bytes, dtype=torch.uint8) if wire_bytes else self._decoded

        self._early = 0 < self._late.numel() * self._late.element_size() <= comm.early_bytes
        self._wires: dict[int, Tensor] = {}
        self._open: dict[int, Handle] = {}  # early receives that are under way, by source

    def expect(self, source: int) -> None:
        """Posts the receive of the next push of `source`, if pushes are received early."""
        if self._early:
            wire = self._wires.setdefault(source, torch.empty_like(self._late))
            self._open[source] = self._comm.irecv(wire, source)

    def take(self, source: int) -> None:
        """Receives the push of which a ticket came; nothing comes for an empty slice."""
        if self._early:
            # It is missing where it could not be posted, because the connection was broken: then
            # the error comes here, where the loop expects it.
            if source not in self._open:
                self.expect(source)

            self._open.pop(source).wait()
        elif not self._empty:
            self._comm.recv(self._late, source)

    def push(self, source: int) -> Tensor:
        """Gives the push that was just taken, decoded.

        The vector is the caller's until the next `expect` or `take`, which may overwrite it.
        """
        wire = self._wires.get(source, self._late)
        # Without a codec what came is the push.
        if self._codec is None:
            return wire

        if not self._empty:
            self._codec.decode(wire, self._decoded)

        return self._decoded

    def close(self, source: int) -> None:
        """Receives the farewell of a worker that sends no more.

        A receive that was posted early has no push to come. Left open it would take whatever the
        worker sends next to this rank, an evaluation for example: one byte of farewell fills it.
        """
        if source in self._open:
            self._open.pop(source).wait()
        elif self._comm.early_bytes:
            self._comm.recv(torch.empty(1, dtype=torch.uint8), source)


class ServerLoop:
    """The state of one `serve`, shared by its threads.

    With several threads nothing is locked but the counters of the log, the first optimiser step
    (which creates the optimiser's state), and the count of steps that are being made.
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
        """Gives the policy its shard and its `apply`; the loop itself starts with `guarded`."""
        self._topology = topology
        self._shard = shard
        self._policy = policy

        self._samples_per_push = samples_per_push
        self._clip_norm = clip_norm
        self._on_update = on_update
        self._survives = survives
        self._several_steps = policy.several_steps

        # Each thread has an updater of its own; the first one to step owns the optimiser's state.
        self._updaters = threading.local()
        self._make_updater = make_updater
        self._first_updater: Any = None
        self._first_step = threading.Lock()

        self._applying = 0  # threads that are in an optimiser step now
        self.errors: list[BaseException] = []

        self.log = ServerLog(num_pushes, topology.num_workers)

        # How versions and pushes belong together depends on what the policy does.
        if policy.applies_later:
            self.log.keep_waiting()

        self.log.read_ahead(policy.reads_ahead)

        policy.start(shard, self.apply)

    def close(self) -> None:
        """Lets go of the policy, which holds `apply` and so this object.

        The cycle would keep the comm's sockets open until Python's collector happens to find it.
        """
        del self._policy

    def guarded(self, comm: Comm) -> None:
        """Runs the loop in its thread, and keeps an error for `serve` to raise."""
        # An exception that a thread lets out would only be printed, and `serve` would return a log
        # as if nothing had happened.
        try:
            self._run(comm)
        except BaseException as error:  # noqa: BLE001  the thread's outermost frame
            self.errors.append(error)

    def _run(self, comm: Comm) -> None:
        """Serves the workers of one group until all of them have said goodbye.

        A group has its own ranks. `names` has the worker's number for each of them, and `local`
        the rank for each world rank: the policy and the log know numbers of workers only.
        """
        policy = self._policy
        log = self.log
        topology = self._topology

        # Where the group's ranks are in the run, and who of them computes.

        local = {world: position for position, world in enumerate(comm.world_ranks)}
        names = [topology.world_ranks.index(world) for world in comm.world_ranks]
        active = {worker for worker in names if worker < topology.num_workers}

        inbox = _Inbox(comm, self._shard, topology.codec, push_bytes=topology.push_bytes)
        for position, worker in enumerate(names):
            if worker in active:
                self._reached(partial(inbox.expect, position))

        # Whoever says goodbye leaves; the loop ends with the last.
        while active:
            source, tag, sent_ns = comm.next_ticket()
            worker = names[source]

            # Found lost before: this second goodbye comes from whoever else found it dead.
            if worker not in active:
                continue

            # A gradient was given up: no push comes, and no answer is asked for.
            if tag == ABANDONED:
                log.abandoned(worker)
                continue

            if tag == GOODBYE or not self._reached(partial(inbox.take, source)):
                # It has finished, or its connection broke before its push was whole.
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

                # Only now: the policy has read the push, whose memory the next one may overwrite.
                self._reached(partial(inbox.expect, source))

            # The policy may name nobody, the worker itself, or others that it held before.
            for answered in answers:
                self._answer(comm, answered, local[topology.world_ranks[answered]])

    def _answer(self, comm: Comm, worker: int, dst: int) -> None:
        """Sends a worker its answer.

        It is counted as overlapped if another thread was in an optimiser step before or after the
        sending, or finished one meanwhile: the worker may then have got a torn vector.
        """
        log = self.log

        # Noted before the sending: the worker may send its next ticket as soon as it has read.
        log.answered(worker)
        started = log.version
        applying = self._applying
        if self._shard.numel():
            self._reached(partial(comm.send, self._policy.answer(worker), dst))

        # Before, after, or in between: any of the three may have changed the vector on its way.
        if applying or self._applying or log.version != started:
            log.overlapped_replies += 1

    def _reached(self, transfer: Callable[[], None]) -> bool:
        """Does the transfer, and says whether the worker was reached.

        False means that the worker is lost and the run survives it: one of the others will say
        its goodbye. Where a loss is not survived the error goes on.
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
        """Makes one optimiser step on the shard, with a gradient of `num_gradients` pushes.

        This is what the policy gets as `apply`; the version grows by 1.
        """
        # The schedule counts samples before the step, without those of the step itself.
        samples = int((self.log.num_used - num_gradients) * self._samples_per_push)

        self._topology.settle(gradient)
        # The norm is that of the whole gradient: all servers agree on it, slice by slice.
        if self._clip_norm is not None:
            factor = clip_factor(self._topology.square_sum(gradient) ** 0.5, self._clip_norm)
            if factor < 1.0:
                gradient.mul_(factor)

        # Counted in and out, so that other threads know of answers that overlap with a step.
        self._count_applying(+1)
        self._step(gradient, max(samples, 0))
        self._count_applying(-1)

        self.log.applied(oldest_of)

        # Where one push is several steps, the owner is told after the last of them only.
        if not self._several_steps:
            self._tell_update()

    def _tell_update(self) -> None:
        """Tells the owner of the run how many samples were used, and the version of the slice."""
        if self._on_update is not None:
            samples = int(self.log.num_used * self._samples_per_push)
            self._on_update(samples, self.log.version)

    def _step(self, gradient: Tensor, samples: int) -> None:
        """Steps with this thread's own updater.

        Parameters are shared between the updaters of all threads, and from the first step on the
        optimiser's state too. The first step is locked, because it creates that state: two
        threads would create one each, and the momentum of one of them would be lost.
        """
        updater: Any = getattr(self._updaters, "mine", None)
        if updater is None:
            # This thread's first step.
            updater = self._updaters.mine = self._make_updater()

            # Whoever is first creates the state; the others share it and step after that.
            if self._topology.num_threads > 1:
                with self._first_step:
                    if self._first_updater is None:
                        updater.step(gradient, samples=samples)
                        self._first_updater = updater
                        return

                updater.share_state(self._first_updater)

        updater.step(gradient, samples=samples)

    def _count_applying(self, change: int) -> None:
        """Counts a thread into its optimiser step (+1), or out of it (-1)."""
        # `+=` on an integer is no single operation: two threads could lose one count.
        if self._topology.num_threads > 1:
            with self._first_step:
                self._applying += change
        else:
            self._applying += change
