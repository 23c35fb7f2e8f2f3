"""Recursive halving and doubling: all-reduce in 2 log2 N rounds (Thakur, Rabenseifner and Gropp
2005).

N' = 2^q <= N workers cut the vector into N' chunks. Reduce-scatter: in round k a worker gives the
half that it will not own to the worker at distance N'/2^(k+1), and adds what comes to the other
half. After q rounds it owns one chunk, which is summed first and divided once. All-gather: the same
rounds backwards. The other N - N' workers are folded (Rabenseifner): each sends its vector to a
partner before, and gets the mean back after.

Sends 2 (N'-1)/N' * M bytes in 2 log2 N' messages per rank and step. A partner of a folded worker
sends M bytes and 1 message more; a folded worker sends M bytes in 1 message.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite import topology
from benchsuite.comm import Comm, Traffic
from benchsuite.topology import bounds

Range = tuple[int, int]  # (start, stop) in the flat vector


@dataclass
class Topology(topology.Topology):
    """Pairs of ranks exchange at halving, then at doubling distances.

    The rounds are few, as in a tree, and where N is a power of two no rank sends more than around
    a ring.
    """

    timing_free = True
    kind = "collective"
    short_label = "halving-doubl."
    order = 2
    num_workers = 0
    num_servers = 0

    def start(self, comm: Comm, *, num_servers: int = 0) -> None:
        assert num_servers == 0, "rules: servers need parameter_server"
        self._comm = comm
        self.num_workers = comm.size
        self._inside = power_of_two(comm.size)  # N'

        # Arrivals, by (numel, dtype): kept, because a step asks for the same size again.
        self._scratch: dict[tuple[int, torch.dtype], Tensor] = {}

    def mean(self, flat: Tensor) -> None:
        """Replaces `flat` (P,) by the mean over the workers."""
        comm = self._comm
        inside = self._inside

        # A single worker's vector is its own mean.
        if self.num_workers == 1:
            return

        # A folded worker hands its vector to its partner and waits for the mean.
        if comm.rank >= inside:
            comm.send(flat, comm.rank - inside)
            comm.recv(flat, comm.rank - inside)
            return

        # Its partner adds the vector before the rounds begin.
        folded = comm.rank + inside if comm.rank + inside < self.num_workers else None
        scratch = self._scratch_for(flat)
        if folded is not None:
            comm.recv(scratch, folded)
            flat.add_(scratch)

        # Reduce-scatter: what is kept halves from round to round.
        rounds = halves(comm.rank, flat.numel(), inside)

        for partner, keep, give in rounds:
            # Arrivals have the same range in the scratch as in the vector.
            partial = scratch[keep[0] : keep[1]]
            self._exchange(flat[give[0] : give[1]], partial, partner)
            flat[keep[0] : keep[1]].add_(partial)

        # The own chunk is whole now.                                          (about P/N',)
        start, stop = bounds(flat.numel(), inside)[comm.rank]
        flat[start:stop].div_(self.num_workers)

        # All-gather: what was kept is final and goes out, what was given away comes back.
        for partner, keep, give in reversed(rounds):
            self._exchange(flat[keep[0] : keep[1]], flat[give[0] : give[1]], partner)

        # Its folded worker waits for the mean.
        if folded is not None:
            comm.send(flat, folded)

    def _scratch_for(self, flat: Tensor) -> Tensor:
        """Gives memory for arrivals as large as `flat`, kept from call to call."""
        key = (flat.numel(), flat.dtype)
        if key not in self._scratch:
            self._scratch[key] = torch.empty_like(flat)

        return self._scratch[key]

    def _exchange(self, outgoing: Tensor, incoming: Tensor, partner: int) -> None:
        """Sends and receives at the same time; an empty range is not sent.

        Where a vector has fewer elements than N', one side of a pair may have nothing to send.
        """
        # Both at once: if both partners sent first, and the message were long, none would receive.
        if outgoing.numel() and incoming.numel():
            self._comm.sendrecv(outgoing, partner, incoming, partner)
        elif outgoing.numel():
            self._comm.send(outgoing, partner)
        elif incoming.numel():
            self._comm.recv(incoming, partner)

    # -- predictions -------------------------------------------------------------------------------

    def predicted_traffic(
        self, numel: int, itemsize: int, *, num_workers: int, num_servers: int = 0
    ) -> Traffic:
        """Predicts the traffic of one mean, by local rank.

        The N' inside send their halves, and the others exchange whole vectors with a partner.
        """
        traffic = Traffic()
        inside = power_of_two(num_workers)

        # Each range of a round travels once: the half given away in the reduce-scatter, the half
        # kept in the all-gather.
        for rank in range(inside):
            for partner, *ranges in halves(rank, numel, inside):
                for start, stop in ranges:
                    if stop > start:
                        traffic.add(rank, partner, (stop - start) * itemsize)

        # Whole vectors go from folded workers to their partners, and means back.
        for folded in range(inside, num_workers if numel else inside):
            traffic.add(folded, folded - inside, numel * itemsize)
            traffic.add(folded - inside, folded, numel * itemsize)

        return traffic


def power_of_two(num_workers: int) -> int:
    """Gives the largest power of two that is not above the number of workers."""
    return 1 << (num_workers.bit_length() - 1)


def halves(rank: int, numel: int, inside: int) -> list[tuple[int, Range, Range]]:
    """Lists the rounds of the reduce-scatter among `inside` = 2^q ranks, as this rank sees them.

    Each round is (partner, range kept, range given away). The ranges of round k together are the
    range kept in round k-1.
    """
    ranges = bounds(numel, inside)

    # The chunks first .. last-1 are still summed here.
    first = 0
    last = inside
    rounds = []
    distance = inside // 2

    while distance:
        middle = first + distance

        # Both halves of what is still summed here.
        low = (ranges[first][0], ranges[middle][0])
        high = (ranges[middle][0], ranges[last - 1][1])

        # The bit of the rank says which half it owns in the end.
        if rank & distance:
            rounds.append((rank ^ distance, high, low))  # the partner owns the lower half
            first = middle
        else:
            rounds.append((rank ^ distance, low, high))
            last = middle

        # The next partner is half as far away.
        distance //= 2

    return rounds
