"""The loop of one rank, by the clock of its world: a worker's steps, or a server's serving.

A worker makes steps 3 to 6 of the article. The same code runs in both worlds: under the wall clock
`main.py` calls it in a process per rank, under the virtual clock `virtual/world.py` in a greenlet
per rank. Time is what `comm.now_ns` says.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Protocol

from benchsuite.comm import Comm
from benchsuite.measure.beat import Phase
from benchsuite.measure.device_time import DeviceTimer
from benchsuite.sync import Work
from benchsuite.worker.clock import Diverged
from benchsuite.worker.rank_record import Measured
from benchsuite.worker.setup import Training
from benchsuite.workload import Batch


class MeasuredPart(Protocol):
    """What the loop reads of a part that is timed: its own totals in ns."""

    compute_ns: int
    backward_wait_ns: int  # inside a library's backward pass, after the last gradient


class MeasuredComm(Comm, Protocol):
    """A comm that also keeps the time for which a server had no work."""

    ticket_wait_ns: int


class Loop:
    """One rank's loop.

    `step` is the number of the step that it is in. enter: `enter(phase, step)` is told on the way,
    for the beat.
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
        """Runs until the budget is used, and writes into `measured` what it took.

        owner: whether snapshots are taken of this rank's parameters.
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
        enter = self.enter
        now = comm.now_ns
        if owner:
            self._snapshot(measured, 0)

        # Where the step before ended, and how much had been computed and waited by then.
        begin = now()
        compute = 0
        blocked = 0

        while (work := strategy.next_index()) is not None:
            index, shard, num_shards = work
            batch, data = self._fetch(work)

            enter(Phase.COMPUTE, self.step)
            try:
                # Steps 3 to 5: the gradient, the agreement, the update. Time in each is kept by
                # part and comm.
                loss = strategy.step(batch)
            except Diverged:
                # The step is kept, with a loss that is not finite and without samples.
                clock.add((begin, now(), data, 0, 0, index * num_shards + shard, 0), math.nan)
                break

            self.step += 1

            number = index * num_shards + shard  # of the shard, among all of the budget
            if owner:
                self._snapshot(measured, self._consumed(number, num_shards))
            if self.timer is not None:
                self.timer.end_step()

            end = now()
            # Totals since the loop began: a step's own share is the difference.
            computed = part.compute_ns
            waited = comm.wait_ns + part.backward_wait_ns
            clock.add(
                (begin, end, data, computed - compute, waited - blocked, number, batch.num_samples),
                loss,
            )
            begin = end
            compute = computed
            blocked = waited

        # Step 6 ends here: what is still under way is drained, and the servers are told goodbye.
        strategy.finish()
        if owner:
            samples = self.step * training.recipe.global_batch
            self._snapshot(
                measured, training.recipe.budget if strategy.apart else samples, last=True
            )

    def _fetch(self, work: Work) -> tuple[Batch, int]:
        """The batch of this work, and how long it took in ns.

        Step 2 of the article; where workers act they collect here.
        """
        self.enter(Phase.DATA, self.step)
        begin = self.comm.now_ns()
        batch = self.training.fetch(work)
        return batch, self.comm.now_ns() - begin

    def _consumed(self, number: int, num_shards: int) -> int:
        """Samples of the budget that all workers have used by this step, the `number`th shard's."""
        global_batch = self.training.recipe.global_batch
        if self.training.strategy.apart:
            # Shards are handed out in order: whoever got this one, those before it are out too.
            return (number + 1) * global_batch // num_shards

        return self.step * global_batch

    def _snapshot(self, measured: Measured, samples: int, *, last: bool = False) -> None:
        """Offers this worker's parameters for the curve."""
        measured.snapshots.offer(
            self.training.strategy.snapshot(),
            samples=samples,
            version=self.step,
            time_ns=self.comm.now_ns(),
            last=last,
        )

    def _serve(self, measured: Measured, *, owner: bool) -> None:
        """A server's loop, which is the topology's; here snapshots of its slice are taken."""
        training = self.training
        snapshots = measured.snapshots
        now = self.comm.now_ns
        # A view: what the server steps is what the snapshot copies.
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
