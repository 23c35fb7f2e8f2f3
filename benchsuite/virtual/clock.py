"""Virtual time: a heap of wake-ups, one greenlet per rank, and nothing else that runs.

Entries are ordered by (time in integer ns, rank, sequence): two things that happen at one moment
happen in rank order, whatever order the ranks were started in, so a run repeats byte for byte.
Whatever blocks gives the thread to the next entry. A heap that is empty while ranks still wait is a
deadlock, and its message says who waits for what.

The thread's grad mode, autocast and random state would leak from rank to rank over a switch: each
task takes its own along.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet

NETWORK = -1  # "rank" of what the network does: before any rank that wakes at the same moment
_random = torch.default_generator


class Deadlock(RuntimeError):
    """Ranks wait, and nothing is under way that could wake them."""


class Task:
    """A greenlet of one rank: its life, or one of its lanes."""

    __slots__ = (
        "autocast",
        "grad_enabled",
        "greenlet",
        "name",
        "random_state",
        "rank",
        "turn",
        "waits_for",
    )

    def __init__(self, rank: int, name: str, body: greenlet) -> None:
        self.rank = rank
        self.name = name
        self.greenlet = body
        # A wake-up is for one pause: a later one for the same pause finds another turn.
        self.turn = 0
        self.waits_for = "its start"

        # What torch keeps for the thread, as it was when the task last paused.
        self.grad_enabled = True
        self.autocast = False
        self.random_state = _random.get_state()


class VirtualClock:
    """Runs tasks in virtual time. `now` is in ns."""

    def __init__(self) -> None:
        self.now = 0
        # (time, rank, sequence, task or function, the task's turn or the function's argument)
        self._heap: list[tuple[int, int, int, Any, Any]] = []
        self._sequence = 0  # no two entries are equal, so the last two are never compared
        self._tasks: list[Task] = []
        self._unfinished = 0  # of the tasks that a run waits for; a lane's is none of them

        self._current: Task | None = None
        self._hub: greenlet | None = None
        self._to_start: greenlet | None = None
        self.failed: Task | None = None  # whose error ended the run; a deadlock is nobody's

    # -- from outside ------------------------------------------------------------------------------

    def spawn(
        self, rank: int, body: Callable[[], None], *, name: str = "", counts: bool = True
    ) -> Task:
        """Makes a task that starts now.

        counts: whether the run is over only when this task has ended. A lane does not count: it
        serves, and never ends.
        """

        def life() -> None:
            self._resume(task)
            body()
            self._unfinished -= counts

        task = Task(rank, name or f"rank {rank}", greenlet(life, self._hub))
        self._tasks.append(task)
        self._unfinished += counts
        self._push(self.now, rank, task, task.turn)

        return task

    def run(self) -> None:
        """Runs until every task that counts has ended.

        The first error of a task is raised with its rank; the others are ended.
        """
        collecting = gc.isenabled()
        # Nothing here forms cycles, and a full collection costs as much as a thousand messages.
        gc.disable()
        outside = Task(NETWORK, "outside", getcurrent())
        self._save(outside)
        self._hub = outside.greenlet
        for task in self._tasks:
            task.greenlet.parent = self._hub
        try:
            while self._unfinished:
                # A greenlet that has not begun counts as false, so it is compared with None.
                chosen = self._to_start
                self._to_start = None
                if chosen is None:
                    chosen = self._next()
                chosen.switch()
        except BaseException as error:
            self.failed = self._current
            if self.failed is not None:
                error.add_note(f"on {self.failed.name}, at {self.now / 1e9:.9g} virtual seconds")
            raise
        finally:
            self._end_all()
            self._resume(outside)
            if collecting:
                gc.enable()

    # -- from inside a task ------------------------------------------------------------------------

    @property
    def task(self) -> Task:
        """The task that runs now."""
        assert self._current is not None, "outside of a run"
        return self._current

    def pause(self, waits_for: str) -> None:
        """Gives the thread away until this task is woken.

        waits_for: what to say of it where nothing wakes it any more.
        """
        task = self._current
        assert task is not None
        task.waits_for = waits_for
        self._save(task)
        following = self._next()

        if following is not task.greenlet:
            if following:
                following.switch()
            else:
                # It has not begun yet. Begun from here it would keep our frames below its own,
                # and a thousand ranks begun in this way are too many frames: the hub begins it.
                assert self._hub is not None
                self._to_start = following
                self._hub.switch()

        self._resume(task)

    def wake(self, task: Task, at: int) -> None:
        """Wakes a task's present pause at a time that is not over yet.

        Of the running task it is the next pause. A wake-up whose pause is over by then does
        nothing.
        """
        self._push(at, task.rank, task, task.turn)

    def wait_until(self, at: int, waits_for: str = "the time") -> None:
        """Pauses the running task until a time; returns at once where that is over."""
        while at > self.now:
            self.wake(self.task, at)
            self.pause(waits_for)

    def call_at(self, at: int, function: Callable[[Any], None], argument: Any) -> None:
        """Calls `function(argument)` at a time, before any rank goes on.

        The function may not pause.
        """
        self._push(at, NETWORK, function, argument)

    # -- inside ------------------------------------------------------------------------------------

    def _push(self, at: int, rank: int, what: Any, argument: Any) -> None:
        """Enters a wake-up; `argument` is the task's turn, or what a function is called with."""
        self._sequence += 1
        heappush(self._heap, (at, rank, self._sequence, what, argument))

    def _next(self) -> greenlet:
        """Takes entries until one is a task's turn, makes that task the current one and returns it.

        Calls functions on the way. Deadlock where no entry is left.
        """
        # One list lives as long as the clock, so the attribute is looked up once.
        heap = self._heap

        while heap:
            at, _, _, what, argument = heappop(heap)
            if type(what) is not Task:  # a function of the network's
                self.now = at
                what(argument)
            elif argument == what.turn and not what.greenlet.dead:
                self.now = at
                what.turn += 1
                self._current = what

                return what.greenlet

        self._current = None
        waiting = [
            f"{task.name} for {task.waits_for}" for task in self._tasks if not task.greenlet.dead
        ]
        shown = "; ".join(waiting[:8])
        if len(waiting) > 8:
            shown += f"; and {len(waiting) - 8} more"
        raise Deadlock(
            f"nothing is under way at {self.now / 1e9:.9g} virtual seconds, and these wait: {shown}"
        )

    def _save(self, task: Task) -> None:
        """Keeps what torch knows of the running task, before another one runs."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "a rank of the virtual clock may not wait inside torch.inference_mode(): use "
                "no_grad()"
            )

        task.grad_enabled = torch.is_grad_enabled()
        task.autocast = torch.is_autocast_enabled("cpu")
        task.random_state = _random.get_state()

    def _resume(self, task: Task) -> None:
        """Gives a task its own state of torch back.

        Setting a mode costs more than asking for it.
        """
        if torch.is_grad_enabled() != task.grad_enabled:
            torch.set_grad_enabled(task.grad_enabled)
        if torch.is_autocast_enabled("cpu") != task.autocast:
            torch.set_autocast_enabled("cpu", task.autocast)
        _random.set_state(task.random_state)

    def _end_all(self) -> None:
        """Ends every task that has begun, so that no greenlet outlives its run."""
        for task in self._tasks:
            if task.greenlet and not task.greenlet.dead:
                task.greenlet.throw(GreenletExit)

        self._tasks.clear()
        self._heap.clear()
