"""A schedule: who computed when in a virtual run, which message went where, and what waited for
what.

`world.simulate(.., record=True)` records it by hooks in `comm.py`, `comm_parts.py`, `comm_lane.py`
and `part.py`; a run that is not recorded has none of this. `programs/chakra.py` writes it for other
simulators.

Events of a rank stand in the order in which its tasks went on, so an event waits for earlier
numbers only. A task (the rank's life, or a lane) knows which events had to be over for it to be
where it is: all it waited for, less what those waited for themselves. The next event waits for just
these; hence it begins when the last of them ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchsuite.virtual.clock import Task, VirtualClock

COMPUTE = "compute"
SEND = "send"
RECEIVE = "receive"
COLLECTIVE = "collective"


@dataclass(slots=True, eq=False)
class Event:
    """One event of one rank. begin, end: virtual ns.

    compute: from asking to done, or to giving up. send: from posting until the last byte has left
    the port. receive: from when the rank waits for it until it is there (no time, where it had come
    before). collective: from entering to leaving. A ticket is a send and a receive that are
    `control`: it takes the latency, and no port.
    """

    rank: int
    number: int  # of the rank's events
    kind: str
    name: str
    begin: int
    end: int
    after: tuple[int, ...]  # numbers of the rank's events that had to be over
    peer: int = -1  # the other rank (world ranks)
    num_bytes: int = 0  # of a collective: of the whole vector
    # Number of the message from this source to this destination; of the collective in its group.
    tag: int = -1
    control: bool = False
    group: str = ""  # name of the comm of a collective
    taken: bool = False  # a send's message has been received


class Schedule:
    """The events of a run, by rank.

    groups: world ranks of each comm that called a collective, by the comm's name.
    """

    def __init__(self, clock: VirtualClock, num_ranks: int) -> None:
        self.events: list[list[Event]] = [[] for _ in range(num_ranks)]
        self.groups: dict[str, tuple[int, ...]] = {}
        self._clock = clock
        # Task -> numbers of its rank's events that had to be over for it to be where it is.
        self._points: dict[Task, tuple[int, ...]] = {}
        self._num_sent: dict[tuple[int, int], int] = {}  # (source, destination) -> messages so far

    @property
    def end(self) -> int:
        """When the last event ends, in ns."""
        return max((event.end for events in self.events for event in events), default=0)

    @property
    def unreceived(self) -> list[Event]:
        """Messages and tickets that nobody has taken."""
        return [
            event
            for rank in self.events
            for event in rank
            if event.kind == SEND and not event.taken
        ]

    # -- told by the hooks, each for the task that runs --------------------------------------------

    def computed(self, name: str, begin: int) -> None:
        """Notes that the running task has computed since `begin`."""
        self._passed(COMPUTE, name, begin)

    def sent(
        self, name: str, destination: int, num_bytes: int, *, end: int, control: bool = False
    ) -> Event:
        """Notes that the running task sends and goes on.

        The event is returned: `waited` notes that the task waited for it, `received` that another
        one took it.
        """
        source = self._clock.task.rank
        # Messages between two ranks are told apart by their number.
        tag = self._num_sent.get((source, destination), 0)
        self._num_sent[source, destination] = tag + 1
        event = self._add(SEND, name, self._clock.now, end)
        event.peer = destination
        event.num_bytes = num_bytes
        event.tag = tag
        event.control = control

        return event

    def waited(self, sent: Event | None) -> None:
        """Notes that the running task has waited for its own send."""
        assert sent is not None, "recorded from the start"
        self.join((sent.number,))

    def received(self, sent: Event | None, begin: int) -> None:
        """Notes that the running task has waited since `begin` for a message, and has it."""
        assert sent is not None, "recorded from the start"
        if sent.taken:
            return  # the task waits for the same message once more

        sent.taken = True
        event = self._passed(RECEIVE, sent.name, begin)
        event.peer = sent.rank
        event.num_bytes = sent.num_bytes
        event.tag = sent.tag
        event.control = sent.control

    def collective(
        self, kind: str, num_bytes: int, begin: int, *, group: str, ranks: Sequence[int], tag: int
    ) -> None:
        """Notes that the running task has been in a collective since `begin`.

        A rank alone was in none, since it sends nothing.
        """
        if len(ranks) > 1:
            event = self._passed(COLLECTIVE, kind, begin)
            event.num_bytes = num_bytes
            event.group = group
            event.tag = tag
            self.groups.setdefault(group, tuple(ranks))

    def point(self) -> tuple[int, ...]:
        """Where the running task is: the events that had to be over for that.

        A lane call is forked at such a point, and ends at one.
        """
        return self._points.get(self._clock.task, ())

    def join(self, point: tuple[int, ...]) -> None:
        """Notes that the running task has waited for these events of its rank too."""
        task = self._clock.task
        events = self.events[task.rank]
        here = self._points.get(task, ())

        for number in point:
            if number not in here:
                # What the event itself waited for need not be waited for once more.
                earlier = events[number].after
                here = (*(each for each in here if each not in earlier), number)

        self._points[task] = here

    # -- inside ------------------------------------------------------------------------------------

    def _add(self, kind: str, name: str, begin: int, end: int) -> Event:
        """Books an event of the running task, which waits for the task's present point."""
        task = self._clock.task
        events = self.events[task.rank]
        event = Event(task.rank, len(events), kind, name, begin, end, self._points.get(task, ()))
        events.append(event)

        return event

    def _passed(self, kind: str, name: str, begin: int) -> Event:
        """Books an event that the task waited for: it goes on from there."""
        event = self._add(kind, name, begin, self._clock.now)
        self._points[self._clock.task] = (event.number,)

        return event
