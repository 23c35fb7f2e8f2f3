"""The simulated network: every host has one full-duplex port with a rate, every message a latency.

A message of M bytes leaves its sender's port first in, first out, is under way for the latency, and
enters the receiver's port first in, first out. It takes alpha + M beta where nobody is in the way,
and N M beta on the port of a server that N workers push to. Bytes pass through both ports at once
(cut-through), so an idle path costs M beta once. A library's collective is one rendezvous, priced
like its textbook algorithm on equal ports.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from math import ceil, log2
from typing import Protocol

from benchsuite.virtual.clock import VirtualClock

NS_PER_US = 1000
BITS_NS = 8000.0  # ns for a byte at 1 Mbit/s


class Arriving(Protocol):
    """A message, which is told when its last byte is there."""

    def arrives(self, at: int) -> None:
        """Called once, as soon as the time is known."""


class Network:
    """Ports between ranks.

    Times are integer ns; without a rate messages take the latency only.

    hosts: host number of each rank; ranks of one host exchange in no time. incast: how much longer
    a message takes to enter a port that others are queueing for.
    """

    def __init__(
        self,
        clock: VirtualClock,
        hosts: Sequence[int],
        *,
        link_mbit: float | None = None,
        latency_us: float | None = None,
        incast: float = 1.0,
    ) -> None:
        self._clock = clock
        self._hosts = tuple(hosts)
        self._incast = incast
        self.ns_per_byte = 0.0 if link_mbit is None else BITS_NS / link_mbit
        self.latency = 0 if latency_us is None else round(latency_us * NS_PER_US)

        # When each port has sent, or taken in, all that it has been given so far.
        ports = max(hosts, default=0) + 1
        self._out_free = [0] * ports
        self._in_free = [0] * ports
        # Per port: (earliest arrival, sequence, duration, message) of those that are under way.
        self._queued: list[list[tuple[int, int, int, Arriving]]] = [[] for _ in range(ports)]
        self._sequence = 0

    def post(self, message: Arriving, source: int, destination: int, num_bytes: int) -> int:
        """Sends a message; returns when its last byte has left the sender.

        The message is told when it is there, now or when the receiver's port has taken it in.
        """
        now = self._clock.now
        out = self._hosts[source]
        into = self._hosts[destination]
        if out == into:
            message.arrives(now)
            return now

        if not self.ns_per_byte:
            message.arrives(now + self.latency)
            return now

        duration = round(num_bytes * self.ns_per_byte)
        # First in, first out: the port sends what it was given before.
        begin = max(now, self._out_free[out])
        self._out_free[out] = begin + duration
        self._sequence += 1
        heappush(self._queued[into], (begin + self.latency, self._sequence, duration, message))

        if begin == now:
            self._admit(into)
        else:
            self._clock.call_at(begin, self._admit, into)

        return begin + duration

    def _admit(self, port: int) -> None:
        """Takes in whatever reaches the port within a latency from now.

        Nothing that is sent later can be there before, so these messages are all that can be in the
        queue.
        """
        queued = self._queued[port]
        # A message that is posted later reaches the port after this moment.
        horizon = self._clock.now + self.latency
        free = self._in_free[port]

        while queued and queued[0][0] <= horizon:
            at, _, duration, message = heappop(queued)
            if free > at:  # others are queueing for the port: incast
                # Switches drop packets where many flows meet, and what is dropped is sent again.
                duration = round(duration * self._incast)
            free = max(at, free) + duration
            message.arrives(free)

        self._in_free[port] = free

    def latency_between(self, source: int, destination: int) -> int:
        """The time that a ticket or flag takes: it is too short to need a port."""
        return 0 if self._hosts[source] == self._hosts[destination] else self.latency

    def collective(self, kind: str, ranks: Sequence[int], num_bytes: int) -> int:
        """Takes all ports of `ranks` as soon as all are free; returns when the collective ends.

        num_bytes: of the whole vector. A barrier needs no port, and what stays on one host takes no
        time.
        """
        hosts = {self._hosts[rank] for rank in ranks}
        # As if every rank had a port of its own.
        price = self.price(kind, len(ranks), num_bytes, single_host=len(hosts) == 1)
        if not num_bytes or len(hosts) == 1:
            return self._clock.now + price

        begin = self._clock.now
        for host in hosts:
            begin = max(begin, self._out_free[host], self._in_free[host])
        end = begin + price
        for host in hosts:
            self._out_free[host] = end
            self._in_free[host] = end

        return end

    def price(self, kind: str, size: int, num_bytes: int, *, single_host: bool = False) -> int:
        """The duration in ns of one collective on equal ports.

        gloo's reduce-scatter costs what an all-reduce costs, two passes of a ring.
        """
        if size == 1 or single_host:
            return 0

        # The whole vector over one port.
        moved = num_bytes * self.ns_per_byte
        rounds = ceil(log2(size))  # of a tree
        share = (size - 1) * (self.latency + moved / size)  # one pass of a ring
        prices = {
            "all_reduce": 2 * share,
            "reduce_scatter": 2 * share,
            "all_gather": share,
            "broadcast": rounds * (self.latency + moved),
            "barrier": 2.0 * rounds * self.latency,
        }

        return round(prices[kind])
