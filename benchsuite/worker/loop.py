"""The loop of one rank by its world's clock: steps 3 to 6 of the article on a worker, the server's
loop on a server.

The same code in both worlds: under the wall clock `worker.py` calls it in a process per rank, under
the virtual one `virtual/world.py` in a greenlet per rank. Time is what `comm.now_ns` says.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Protocol

from benchsuite.comm import Comm
from benchsuite.measure.beat import Phase
from benchsuite.measure.device_time import DeviceTimer
from benchsuite.worker.clock import Diverged
from benchsuite.worker.rank_record import Measured
from benchsuite.worker.setup import Training


class MeasuredPart(Protocol):
    """What the loop reads of a part that is timed."""

    compute_ns: int
    backward_wait_ns: int  # inside a library's backward pass, after the last gradient


class MeasuredComm(Comm, Protocol):
    """A comm that also keeps a server's time without work apart."""

    ticket_wait_ns: int


class Loop:
    """One rank's loop.

    `step` is where it is. `enter(phase, step)` is told on the way (the beat).
    """

    def __init__(
        self,
        training: Training,
        part: MeasuredPart,
        comm: MeasuredComm,
        enter: Callable[[Phase, int], None],
        timer: DeviceTimer | None = None,
    ) -> None:
        self.training = training
        self.part = part
        self.comm = comm
        self.enter = enter
        self.timer = timer
        self.step = 0

    def run(self, measured: Measured, *, owner: bool) -> None:
        """Until the budget is used.

        `owner`: this rank's parameters are what snapshots are taken of.
        """
        # What building and connecting took is not the run's.
        self.comm.wait_ns = 0
        self.comm.ticket_wait_ns = 0
        self.part.compute_ns = 0
        self.part.backward_wait_ns = 0
        if self.timer is not None:
            self.timer.start()
        measured.start_ns = self.comm.now_ns()

        if self.training.is_server:
            self._serve(measured, owner=owner)
        else:
            self._work(measured, owner=owner)

        # The run ends when the device has done its work, not when the host has asked for it.
        times = self.timer.settle() if self.timer is not None else []
        measured.end_ns = self.comm.now_ns()
        self.part.compute_ns += sum(step.compute_ns for step in times)
        self.comm.wait_ns += sum(step.blocked_ns for step in times)
        measured.clock.settle(times)

        measured.compute_ns = self.part.compute_ns
        measured.ticket_wait_ns = self.comm.ticket_wait_ns
        measured.blocked_ns = self.comm.wait_ns + self.part.backward_wait_ns
        measured.events = self.training.events(measured.server)

    def _work(self, measured: Measured, *, owner: bool) -> None:
        """A worker's loop: data, gradient, agreement, update."""
        training = self.training
        part = self.part
        comm = self.comm
        strategy = training.strategy
        clock = measured.clock
        snapshots = measured.snapshots
        global_batch = training.recipe.global_batch
        enter = self.enter
        now = comm.now_ns
        apart = strategy.apart  # then batches are handed out one by one
        if owner:
            snapshots.offer(strategy.snapshot(), samples=0, version=0, time_ns=now())

        # Where the step before ended, and how much had been computed and waited by then.
        begin = now()
        compute = 0
        blocked = 0
        while (work := strategy.next_index()) is not None:
            index, shard, num_shards = work
            enter(Phase.DATA, self.step)
            fetch = now()
            batch = training.fetch(work)
            data = now() - fetch
            enter(Phase.COMPUTE, self.step)
            try:
                loss = strategy.step(batch)
            except Diverged:
                # The step is kept, with a loss that is not finite and without samples.
                clock.add((begin, now(), data, 0, 0, index * num_shards + shard, 0), math.nan)
                break
            self.step += 1
            number = index * num_shards + shard  # of the shard, among all of the budget
            if owner:
                # Whoever was handed this shard, those before it were handed out too.
                handed_out = (number + 1) * global_batch // num_shards
                samples = handed_out if apart else self.step * global_batch
                snapshots.offer(
                    strategy.snapshot(), samples=samples, version=self.step, time_ns=now()
                )
            if self.timer is not None:
                self.timer.end_step()
            end = now()
            computed = part.compute_ns
            waited = comm.wait_ns + part.backward_wait_ns
            clock.add(
                (begin, end, data, computed - compute, waited - blocked, number, batch.num_samples),
                loss,
            )
            begin = end
            compute = computed
            blocked = waited
        strategy.finish()
        if owner:
            samples = training.recipe.budget if apart else self.step * global_batch
            snapshots.offer(
                strategy.snapshot(), samples=samples, version=self.step, time_ns=now(), last=True
            )

    def _serve(self, measured: Measured, *, owner: bool) -> None:
        """A server's loop is the topology's; this takes snapshots of its slice."""
        training = self.training
        snapshots = measured.snapshots
        now = self.comm.now_ns
        shard = training.shard()
        one_at_a_time = threading.Lock()  # a server without lock has several threads

        def on_update(samples: int, version: int) -> None:
            self.step = version
            if owner:
                with one_at_a_time:
                    snapshots.offer(shard, samples=samples, version=version, time_ns=now())

        if owner:
            snapshots.offer(shard, samples=0, version=0, time_ns=now())
        measured.server = training.serve(on_update)

        if owner:
            samples = int(measured.server.num_used * training.samples_per_push)
            version = measured.server.version
            snapshots.offer(shard, samples=samples, version=version, time_ns=now(), last=True)
