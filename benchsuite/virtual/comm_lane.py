"""Lanes and locks of `VirtualComm`: a second task of a rank, and who comes first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchsuite.virtual.clock import Task
from benchsuite.virtual.rank_comm import RankComm


class LaneHandle:
    """What one lane call returned or raised, once it has ended."""

    def __init__(self, comm: RankComm) -> None:
        self._comm = comm
        self._task: Task | None = None  # who waits for it
        self.done = False
        # Of a schedule: first where the call is forked, then where it ends.

        self.point: tuple[int, ...] = ()

        self.value: Any = None
        self.error: BaseException | None = None

    def ends(self) -> None:
        """Called by the lane when the call is over; wakes whoever waits for it."""
        self.done = True
        if self._task is not None:
            self._comm.clock.wake(self._task, self._comm.clock.now)

    def wait(self) -> Any:
        """Waits for the call; returns its value or raises its error."""
        clock = self._comm.clock
        begin = clock.now
        while not self.done:
            self._task = clock.task
            clock.pause("its lane")

        self._comm.wait_ns += clock.now - begin
        if self._comm.schedule is not None:
            self._comm.schedule.join(self.point)
        if self.error is not None:
            raise self.error

        return self.value


class Lane:
    """A second task of a rank, which runs what it is handed in order, beside the first task."""

    def __init__(self, comm: RankComm, make_comm: Callable[[], RankComm]) -> None:
        self._comm = comm
        self._make_comm = make_comm
        self._calls: deque[tuple[Callable[..., Any], tuple[Any, ...], LaneHandle]] = deque()
        self._idle = False
        rank = comm.mine
        self._task = comm.clock.spawn(rank, self._run, name=f"a lane of rank {rank}", counts=False)

    def submit(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> LaneHandle:
        """Appends a call, and wakes the lane where it has nothing to do."""
        handle = LaneHandle(self._comm)
        if self._comm.schedule is not None:
            handle.point = self._comm.schedule.point()
        # The lane's own task takes it from here, in order.
        self._calls.append((fn, args, handle))
        if self._idle:
            self._idle = False
            self._comm.clock.wake(self._task, self._comm.clock.now)

        return handle

    def _run(self) -> None:
        """Runs calls for ever; the clock ends it with the run."""
        comm = self._make_comm()
        schedule = comm.schedule

        while True:
            while not self._calls:
                self._idle = True
                self._comm.clock.pause("something to do")

            fn, args, handle = self._calls.popleft()
            if schedule is not None:
                schedule.join(handle.point)
            try:
                # The call has a comm of its own, so its messages do not mix with those of the
                # rank's life.
                handle.value = fn(comm, *args)
            except Exception as error:  # noqa: BLE001  handed to whoever waits
                handle.error = error

            if schedule is not None:
                handle.point = schedule.point()
            handle.ends()


@dataclass
class LockState:
    """Who holds a lock, and who waits for it; first come, first served."""

    taken: bool = False
    waiting: deque[Task] = field(default_factory=deque)


class Lock:
    """A context manager on a lock that all ranks of a comm share."""

    def __init__(self, state: LockState, comm: RankComm) -> None:
        self._state = state
        self._comm = comm

    def __enter__(self) -> Lock:
        clock = self._comm.clock
        begin = clock.now
        if self._state.taken:
            self._state.waiting.append(clock.task)
            # Whoever gives the lock back hands it to this task, so it is not free in between.
            clock.pause("a lock")  # woken as its holder

        self._state.taken = True
        self._comm.wait_ns += clock.now - begin
        return self

    def __exit__(self, *_: object) -> None:
        """Hands the lock to the first who waits, or gives it back.

        It stays taken when it is handed on.
        """
        if self._state.waiting:
            self._comm.clock.wake(self._state.waiting.popleft(), self._comm.clock.now)
        else:
            self._state.taken = False
