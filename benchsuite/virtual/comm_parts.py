"""What is under way between `VirtualComm`s: messages and those who wait for them, meetings of a
collective, tickets.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from torch import Tensor

from benchsuite.virtual.clock import Task, VirtualClock
from benchsuite.virtual.rank_comm import RankComm
from benchsuite.virtual.schedule import Event


class Message:
    """A vector under way.

    `x` is the sender's own memory until the receiver has it, or the sender goes on.
    """

    __slots__ = ("at", "receive", "sent", "x")

    def __init__(self, clock: VirtualClock, x: Tensor) -> None:
        self.x = x
        self.at: int | None = None  # when its last byte is there, once known
        self.receive: Receive | None = None
        self.sent: Event | None = None  # where a schedule is recorded

    def arrives(self, at: int) -> None:
        """Told by the network."""
        self.at = at
        if self.receive is not None:
            self.receive.expect(at)


class Channel:
    """Messages from one rank to another of one comm, matched in posting order."""

    __slots__ = ("messages", "receives")

    def __init__(self) -> None:
        self.messages: deque[Message] = deque()
        self.receives: deque[Receive] = deque()

    def put(self, message: Message) -> None:
        """A send."""
        if self.receives:
            self.receives.popleft().match(message)
        else:
            self.messages.append(message)

    def ask(self, receive: Receive) -> None:
        """A receive."""
        if self.messages:
            receive.match(self.messages.popleft())
        else:
            self.receives.append(receive)


class Send:
    """Done when the last byte has left the port."""

    __slots__ = ("_comm", "_message", "_released")

    def __init__(self, comm: RankComm, message: Message, released: int) -> None:
        self._comm = comm
        self._message = message
        self._released = released

    def wait(self) -> None:
        comm = self._comm
        message = self._message
        clock = comm.clock
        begin = clock.now
        if self._released > begin:
            clock.wait_until(self._released, "its send")
            comm.wait_ns += clock.now - begin
        if comm.schedule is not None:
            comm.schedule.waited(message.sent)
        if message.receive is None:  # the sender may change its vector from here on
            message.x = message.x.clone()


class Receive:
    """Done at the arrival, never before; the vector may be written earlier, as by a network
    card.
    """

    __slots__ = ("_comm", "_src", "_task", "at", "sent", "x")

    def __init__(self, comm: RankComm, x: Tensor, src: int) -> None:
        self._comm = comm
        self.x = x
        self._src = src
        self.at: int | None = None
        self.sent: Event | None = None  # of its message
        self._task: Task | None = None

    def match(self, message: Message) -> None:
        """The message that this receive takes."""
        if message.x.numel() != self.x.numel():
            raise RuntimeError(
                f"a message of {message.x.numel()} elements from rank {self._src} for a receive of "
                f"{self.x.numel()} "
                f"on rank {self._comm.rank}: lengths must be equal"
            )
        self.x.copy_(message.x)
        message.receive = self
        self.sent = message.sent
        if message.at is not None:
            self.expect(message.at)

    def expect(self, at: int) -> None:
        """The arrival is known."""
        self.at = at
        if self._task is not None:
            self._comm.clock.wake(self._task, max(at, self._comm.clock.now))

    def ready(self) -> bool:
        """Whether it has arrived by now."""
        return self.at is not None and self.at <= self._comm.clock.now

    def wake_at_arrival(self, task: Task) -> None:
        """Wakes the task's next pause when the message is there (it may be woken by others
        before).
        """
        self._task = task
        if self.at is not None:
            self._comm.clock.wake(task, self.at)

    def forget(self) -> None:
        """Nobody waits for it any more."""
        self._task = None

    def wait(self) -> None:
        comm = self._comm
        clock = comm.clock
        begin = clock.now
        if self.at is None or self.at > begin:
            task = clock.task
            while not self.ready():
                self.wake_at_arrival(task)
                clock.pause(f"a message from rank {self._src}")
            self._task = None
        if comm.schedule is not None:
            comm.schedule.received(self.sent, begin)
        busy = comm.world.receive_ns_per_byte
        if busy:
            here = clock.now
            clock.wait_until(
                here + round(self.x.numel() * self.x.element_size() * busy), "its own copying"
            )
            if comm.schedule is not None:
                comm.schedule.computed("copy", here)
        comm.wait_ns += clock.now - begin


class Meeting:
    """One collective of one comm."""

    def __init__(self, size: int) -> None:
        self.entries: list[Any] = [None] * size
        self.at: int | None = None  # when it ends, once everybody is there
        self._what: Any = None
        self._tasks: list[Task] = []

    def join(self, rank: int, what: Any, entry: Any, task: Task) -> bool:
        """Enters; True for the last one. RuntimeError where the ranks call different things."""
        if self._tasks and what != self._what:
            raise RuntimeError(
                f"rank {rank} calls {what[0]} of {what[1]} elements while others call "
                f"{self._what[0]} of "
                f"{self._what[1]}: every rank must enter the same collective"
            )
        self._what = what
        self.entries[rank] = entry
        self._tasks.append(task)
        return len(self._tasks) == len(self.entries)

    def ends(self, at: int, clock: VirtualClock) -> None:
        """Everybody goes on then. The last one, who calls this, does not wait yet."""
        self.at = at
        for task in self._tasks:
            if task is not clock.task:
                clock.wake(task, at)


class Ticket(NamedTuple):
    """`at`: when it is there."""

    at: int
    source: int
    tag: int
    sent_ns: int
    sent: Event | None


class Tickets:
    """Tickets for one rank, in the order of their arrival."""

    def __init__(self) -> None:
        self._queue: deque[Ticket] = deque()
        self._task: Task | None = None

    def put(self, ticket: Ticket, clock: VirtualClock) -> None:
        """One more; a ticket from nearer by may overtake."""
        queue = self._queue
        if queue and queue[-1].at > ticket.at:
            self._queue = queue = deque(sorted([*queue, ticket], key=lambda each: each.at))
        else:
            queue.append(ticket)
        if self._task is not None and queue[0] is ticket:
            clock.wake(self._task, ticket.at)

    def take(self, clock: VirtualClock) -> Ticket:
        """Waits for the first one."""
        while not self._queue or self._queue[0].at > clock.now:
            self._task = clock.task
            if self._queue:
                clock.wake(self._task, self._queue[0].at)
            clock.pause("a ticket")
        self._task = None
        return self._queue.popleft()
