"""`VirtualComm`: the `Comm` protocol in simulated time.

The same strategies as under the wall clock run on it, in one thread. Vectors are really exchanged,
and time passes as `virtual/network.py` says. A send leaves the caller when its last byte has left
the port; what the receiver has not asked for by then is copied, nothing else is.

A library's collective is one rendezvous: added in rank order, priced like its textbook algorithm,
and noted in `calls`, from which its payload is derived. Counters, locks and shared memory take no
time; a ticket takes the latency.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from benchsuite.comm import Comm, Traffic
from benchsuite.comm.traffic import COUNTER_BYTES, TICKET_BYTES, Calls
from benchsuite.errors import UsageError
from benchsuite.virtual.comm_lane import Lane, Lock
from benchsuite.virtual.comm_parts import Channel, Meeting, Message, Receive, Send, Ticket
from benchsuite.virtual.comm_world import VirtualWorld


class VirtualComm:
    """A `Comm` of one rank in virtual time.

    calls: the library's collectives of all ranks that were given the same mapping.
    """

    def __init__(
        self,
        world: VirtualWorld,
        *,
        rank: int,
        size: int,
        name: str = "world",
        world_ranks: Sequence[int] = (),
        hosts: Sequence[int] = (),
        traffic: Traffic | None = None,
        calls: Calls | None = None,
    ) -> None:
        # Ranks are local to this comm; `world_ranks` names them in the run.
        self.rank = rank
        self.size = size
        self.world_ranks: Sequence[int] = tuple(world_ranks) or tuple(range(size))
        self.hosts: Sequence[int] = tuple(hosts) or (0,) * size
        self.traffic = traffic if traffic is not None else Traffic()
        self.calls: Calls = calls if calls is not None else {}

        self.wait_ns = 0
        self.ticket_wait_ns = 0  # a server's time without work
        self.posts_ahead = world.posts_ahead
        self.early_bytes = 0  # a receive costs the same whenever it is posted
        self.world = world
        self.clock = world.clock

        self._network = world.network
        self._name = name
        self.schedule = world.schedule
        self.mine = self.world_ranks[rank]
        # Channels are made when first used: a star of 1024 ranks needs few of its pairs.
        self._sending: dict[int, Channel] = {}
        self._receiving: dict[int, Channel] = {}
        self._tickets = world.tickets(name, rank)
        # All ranks of a comm call in the same order, so equal numbers mean the same call.
        self._num_collectives = 0
        self._splits = 0
        self._num_made = 0  # shared vectors and locks

        self._lane: Lane | None = None

    # -- point to point ----------------------------------------------------------------------------

    def send(self, x: Tensor, dst: int) -> None:
        self.isend(x, dst).wait()

    def recv(self, x: Tensor, src: int) -> None:
        self.irecv(x, src).wait()

    def sendrecv(self, x: Tensor, dst: int, y: Tensor, src: int) -> None:
        """Receives and sends at once.

        The receive is posted first, so no vector has to be copied.
        """
        receiving = self.irecv(y, src)
        sending = self.isend(x, dst)
        receiving.wait()
        sending.wait()

    def isend(self, x: Tensor, dst: int) -> Send:
        """Posts a message; the network says when its last byte has left, and when it arrives."""
        num_bytes = x.numel() * x.element_size()
        other = self.world_ranks[dst]
        # Bytes count when they are sent, whether or not anybody takes them.
        self.traffic.add(self.mine, other, num_bytes)
        message = Message(self.clock, x)
        released = self._network.post(message, self.mine, other, num_bytes)
        if self.schedule is not None:
            message.sent = self.schedule.sent("message", other, num_bytes, end=released)
        channel = self._sending.get(dst)
        if channel is None:
            channel = self._sending[dst] = self.world.channel(self._name, self.rank, dst)
        channel.put(message)
        return Send(self, message, released)

    def irecv(self, x: Tensor, src: int) -> Receive:
        """Posts a receive, which takes the next message from `src` in posting order."""
        receive = Receive(self, x, src)
        channel = self._receiving.get(src)
        if channel is None:
            channel = self._receiving[src] = self.world.channel(self._name, src, self.rank)
        channel.ask(receive)
        return receive

    # -- collectives of the library (derived, not counted) -----------------------------------------

    def all_reduce(self, x: Tensor) -> None:
        """The sum over all ranks, made in rank order and given to all."""

        def finish(entries: Sequence[Tensor]) -> None:
            total = entries[0].clone()  # (numel,)
            for entry in entries[1:]:
                total.add_(entry)
            for entry in entries:
                entry.copy_(total)

        self._collective("allreduce", "all_reduce", x, x.numel(), x.element_size(), finish)

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """The vectors of all ranks, one behind the other in rank order."""

        def finish(entries: Sequence[tuple[Tensor, Tensor]]) -> None:
            whole = torch.cat([mine for _, mine in entries])  # (size * numel,)
            for target, _ in entries:
                target.copy_(whole)

        self._collective(
            "allgather", "all_gather", (out, x), out.numel(), out.element_size(), finish
        )

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """The sum over all ranks, of which each gets its own slice."""

        def finish(entries: Sequence[tuple[Tensor, Tensor]]) -> None:
            total = entries[0][1].clone()  # (size * numel of out,)
            for _, entry in entries[1:]:
                total.add_(entry)
            for (target, _), piece in zip(entries, total.view(len(entries), -1), strict=True):
                target.copy_(piece)

        self._collective(
            "reduce_scatter", "reduce_scatter", (out, x), x.numel(), x.element_size(), finish
        )

    def broadcast(self, x: Tensor, root: int) -> None:
        """The root's vector, on all ranks."""

        def finish(entries: Sequence[Tensor]) -> None:
            for entry in entries:
                if entry is not entries[root]:
                    entry.copy_(entries[root])

        self._collective("broadcast", "broadcast", x, x.numel(), x.element_size(), finish)

    def barrier(self) -> None:
        self._collective("", "barrier", None, 0, 1, lambda entries: None)

    def _collective(
        self,
        call: str,
        kind: str,
        entry: Any,
        numel: int,
        itemsize: int,
        finish: Callable[[Sequence[Any]], None],
    ) -> None:
        """Meets the other ranks of this comm; the last one to come computes the result for all.

        call: the c10d name under which its bytes are derived, "" = none are. kind: whose price it
        has. entry: what this rank brings. finish: makes the results from all entries, in rank
        order.
        """
        number = self._num_collectives
        self._num_collectives += 1
        meeting: Meeting = self.world.meeting(self._name, number, self.size)

        if meeting.join(self.rank, (kind, numel, itemsize), entry, self.clock.task):
            # The last rank to come makes everybody's result, and says when all may go on.
            finish(meeting.entries)
            if call and self.size > 1:
                noted = (call, numel, itemsize, tuple(self.world_ranks))
                self.calls[noted] = self.calls.get(noted, 0) + 1

            end = self._network.collective(kind, self.world_ranks, numel * itemsize)
            # The next collective of the same number would be another one.
            self.world.close(self._name, number)
            meeting.ends(end, self.clock)

        begin = self.clock.now
        while meeting.at is None:
            self.clock.pause(f"a {kind} with {self.size} ranks")
        self.clock.wait_until(meeting.at, f"a {kind} with {self.size} ranks")
        self.wait_ns += self.clock.now - begin

        if self.schedule is not None:
            self.schedule.collective(
                kind, numel * itemsize, begin, group=self._name, ranks=self.world_ranks, tag=number
            )

    # -- lanes and groups --------------------------------------------------------------------------

    def lane(self, fn: Callable[..., Any], *args: Any) -> Any:
        if self._lane is None:
            self._lane = Lane(self, lambda: self._child(f"{self._name}/lane", range(self.size)))
        return self._lane.submit(fn, args)

    def split(self, ranks: Sequence[int]) -> VirtualComm | None:
        name = f"{self._name}/{self._splits}:{'-'.join(map(str, ranks))}"
        self._splits += 1
        if self.rank not in ranks:
            return None

        return self._child(name, list(ranks))

    def _child(self, name: str, ranks: Sequence[int]) -> VirtualComm:
        """A comm of some of these ranks, which counts into the same books."""
        return VirtualComm(
            self.world,
            rank=list(ranks).index(self.rank),
            size=len(ranks),
            name=name,
            world_ranks=[self.world_ranks[rank] for rank in ranks],
            hosts=[self.hosts[rank] for rank in ranks],
            traffic=self.traffic,
            calls=self.calls,
        )

    # -- clock, counters, tickets ------------------------------------------------------------------

    def now_ns(self) -> int:
        return self.clock.now

    def fetch_add(self, name: str, n: int) -> int:
        self.traffic.add_control(self.mine, COUNTER_BYTES)
        return self.world.fetch_add(self._name, name, n, self.mine)

    def ticket(self, dst: int, tag: int) -> None:
        self.traffic.add_control(self.mine, TICKET_BYTES)
        now = self.clock.now
        other = self.world_ranks[dst]
        # Too short to need a port: it takes the latency only.
        at = now + self._network.latency_between(self.mine, other)
        sent = None
        if self.schedule is not None:
            sent = self.schedule.sent("ticket", other, TICKET_BYTES, end=now, control=True)
        self.world.tickets(self._name, dst).put(Ticket(at, self.rank, tag, now, sent), self.clock)

    def next_ticket(self) -> tuple[int, int, int]:
        begin = self.clock.now
        ticket = self._tickets.take(self.clock)
        self.ticket_wait_ns += self.clock.now - begin
        if self.schedule is not None:
            self.schedule.received(ticket.sent, begin)
        return ticket.source, ticket.tag, ticket.sent_ns

    def farewell(self, dst: int) -> None:
        """Never called: a receive costs the same whenever it is posted, so none is open early."""
        raise AssertionError("early_bytes = 0: no receive is open at a goodbye")

    # -- one host only -----------------------------------------------------------------------------

    def shared(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        self._one_host(f"shared({name!r})")
        return self.world.shared(self._name, self._once(name), numel, dtype)

    def lock(self, name: str) -> AbstractContextManager[Any]:
        self._one_host(f"lock({name!r})")
        return Lock(self.world.lock(self._name, self._once(name)), self)

    def _once(self, name: str) -> str:
        """A name that no earlier call has used: all ranks call in the same order."""
        self._num_made += 1
        return f"{name}/{self._num_made}"

    def _one_host(self, what: str) -> None:
        """Raises UsageError where the ranks are on several hosts."""
        if len(set(self.hosts)) > 1:
            raise UsageError(
                f"{what}: shared memory joins ranks of one host, these are on "
                f"{len(set(self.hosts))}: split by host"
            )


def _is_a_comm(comm: VirtualComm) -> Comm:
    """Lets the type checker hold VirtualComm against the protocol."""
    return comm
