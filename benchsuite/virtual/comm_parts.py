"""What is under way between `VirtualComm`s: messages, receives, collectives and tickets."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from torch import Tensor

from benchsuite.virtual.clock import Task, VirtualClock
from benchsuite.virtual.rank_comm import RankComm
from benchsuite.virtual.schedule import Event


class Message:
    """A vector under way.

    `x` is the sender's own memory until the receiver has taken it, or until the sender goes on:
    then it is a copy.
    """

    __slots__ = ("at", "receive", "sent", "x")

    def __init__(self, clock: VirtualClock, x: Tensor) -> None:
        self.x = x
        self.at: int | None = None  # when its last byte is there, once known
        self.receive: Receive | None = None
        self.sent: Event | None = None  # where a schedule is recorded

    def arrives(self, at: int) -> None:
        """Called by the network, as soon as it knows when the last byte will be there."""
        self.at = at
        if self.receive is not None:
            self.receive.expect(at)


class Channel:
    """Messages from one rank of a comm to another one, matched with receives in posting order."""

    __slots__ = ("messages", "receives")

    def __init__(self) -> None:
        self.messages: deque[Message] = deque()
        self.receives: deque[Receive] = deque()

    def put(self, message: Message) -> None:
        """Posts a message: for the first receive that waits, or for one that is still to come."""
        if self.receives:
            self.receives.popleft().match(message)
        else:
            self.messages.append(message)

    def ask(self, receive: Receive) -> None:
        """Posts a receive: for the first message there is, or for one that is still to come."""
        if self.messages:
            receive.match(self.messages.popleft())
        else:
            self.receives.append(receive)


class Send:
    """The handle of a send: done when the last byte has left the port."""

    __slots__ = ("_comm", "_message", "_released")

    def __init__(self, comm: RankComm, message: Message, released: int) -> None:
        self._comm = comm
        self._message = message
        self._released = released

    def wait(self) -> None:
        """Waits until the port is free of the message; then the sender may change its vector."""
        comm = self._comm
        message = self._message
        clock = comm.clock
        begin = clock.now
        if self._released > begin:
            clock.wait_until(self._released, "its send")
            comm.wait_ns += clock.now - begin

        if comm.schedule is not None:
            comm.schedule.waited(message.sent)
        if message.receive is None:
            # Nobody has asked for it yet, and the sender may change its vector from here on.
            message.x = message.x.clone()


class Receive:
    """The handle of a receive: done at the arrival, never before.

    The vector itself may be written earlier, as a network card does.
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
        """Takes a message. RuntimeError where it has another length."""
        if message.x.numel() != self.x.numel():
            raise RuntimeError(
                f"a message of {message.x.numel()} elements from rank {self._src} for a receive of "
                f"{self.x.numel()} "
                f"on rank {self._comm.rank}: lengths must be equal"
            )

        # The data may come early, since nobody looks at them before `wait` returns.
        self.x.copy_(message.x)
        # The message tells this receive when it arrives.
        message.receive = self
        self.sent = message.sent
        if message.at is not None:
            self.expect(message.at)

    def expect(self, at: int) -> None:
        """Told when the message arrives, once that is known."""
        self.at = at
        if self._task is not None:
            self._comm.clock.wake(self._task, max(at, self._comm.clock.now))

    def ready(self) -> bool:
        """Whether the message has arrived by now."""
        return self.at is not None and self.at <= self._comm.clock.now

    def wake_at_arrival(self, task: Task) -> None:
        """Wakes the task's next pause when the message is there. Others may wake it earlier."""
        self._task = task
        if self.at is not None:
            self._comm.clock.wake(task, self.at)

    def forget(self) -> None:
        """Says that nobody waits for the message any more."""
        self._task = None

    def wait(self) -> None:
        """Waits for the message, then for the rank's own copying, where that takes time."""
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
            num_bytes = self.x.numel() * self.x.element_size()
            clock.wait_until(here + round(num_bytes * busy), "its own copying")
            if comm.schedule is not None:
                comm.schedule.computed("copy", here)

        comm.wait_ns += clock.now - begin


class Meeting:
    """One collective of one comm: who has come, and when it ends."""

    def __init__(self, size: int) -> None:
        self.entries: list[Any] = [None] * size
        self.at: int | None = None  # when it ends, once everybody is there

        self._what: Any = None
        self._tasks: list[Task] = []

    def join(self, rank: int, what: Any, entry: Any, task: Task) -> bool:
        """Enters this rank; True for the last one.

        what: the call with its length. RuntimeError where the ranks call different things.
        """
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
        """Sets the time at which everybody goes on.

        The last rank, which calls this, does not wait yet.
        """
        self.at = at
        for task in self._tasks:
            if task is not clock.task:
                clock.wake(task, at)


class Ticket(NamedTuple):
    """A ticket under way. `at`: when it is there, in ns."""

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
        """Adds a ticket. One from nearer by may overtake those that were sent before it."""
        queue = self._queue

        if queue and queue[-1].at > ticket.at:
            # The sort is stable: tickets of one moment stay in the order of their sending.
            queue = deque(sorted([*queue, ticket], key=lambda each: each.at))
            self._queue = queue
        else:
            queue.append(ticket)

        if self._task is not None and queue[0] is ticket:
            clock.wake(self._task, ticket.at)

    def take(self, clock: VirtualClock) -> Ticket:
        """Waits for the first ticket and takes it."""
        while not self._queue or self._queue[0].at > clock.now:
            self._task = clock.task
            if self._queue:
                # It may be woken before by a ticket that overtakes this one.
                clock.wake(self._task, self._queue[0].at)
            clock.pause("a ticket")

        self._task = None
        return self._queue.popleft()
