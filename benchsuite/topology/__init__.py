"""How vectors travel between ranks: the base classes of topologies, and the arithmetic they share.

`Topology` is for those that reduce (collectives and the parameter server), `Graph` for those that
say who mixes with whom in a step of gossip. The functions below cut vectors into ranges, add them
in a fixed order, and say what the common patterns (a ring, one number per rank) put on the wire.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from benchsuite.comm import Comm, Traffic
from benchsuite.errors import UsageError
from benchsuite.workload import Part


class Topology(Protocol):
    """A reducing topology: one file in `topology/`, a dataclass that inherits from this class.

    A parameter server has `exchange` and `serve` besides (`topology/parameter_server.py`); a gossip
    graph is a `Graph`. A topology has no other state than its options before `start`.
    """

    @property
    def payload_source(self) -> str:
        """How the bytes of a run are known.

        "counted" where they are our own sends, "derived" where they are calls of the library.
        """
        return "counted"

    timing_free: bool = False
    """Whether what is added, and in which order, does not depend on who is fast."""

    by_host: bool = False
    """Whether the order of addition depends on which ranks share a host.

    `place` is called then, before `start` and before a prediction.
    """

    owns_buffer: bool = False
    """Whether a gradient that lives in memory given by `buffer` is reduced without being copied."""

    gathers: bool = False
    """Whether it has `gather`, which brings every worker's vector of bytes to all of them.

    A compression whose output cannot be summed needs it.
    """

    scatters: bool = False
    """Whether it has `scatter`, which brings each piece of bytes to the rank that owns it.

    This is the first half of a mean; a compression that sums at the owner needs it.
    """

    num_workers: int
    """Ranks that compute; known after `start`."""

    def start(self, comm: Comm, *, num_servers: int = 0) -> None:
        """Is called once on every rank; the last `num_servers` ranks of `comm` are servers."""

    def place(self, hosts: Sequence[int]) -> None:
        """Takes the host number of every rank.

        Called before `start`, and before a prediction, where `by_host` is true.
        """
        return

    def second(self) -> Topology:
        """Makes a fresh instance with the same options, which is not started.

        A second lane of communication has a group of its own, so it needs a topology of its own.
        """
        return dataclasses.replace(self)  # type: ignore[type-var]  # members are dataclasses

    def buffer(self, numel: int, like: Tensor) -> Tensor:
        """Gives the memory in which the flat gradient should live; ordinary memory by default."""
        return torch.zeros(numel, dtype=like.dtype, device=like.device)

    def mean(self, flat: Tensor) -> None:
        """Replaces `flat` by its mean over the workers, in place, the same bits on all of them.

        Every implementation sums first and divides once, so that topologies differ in the order
        of addition only.
        """

    def gather(self, wire: Tensor) -> list[Tensor]:
        """Returns every worker's vector of bytes, all of one size, in rank order.

        Only a topology that says `gathers` has it.
        """
        raise self._cannot_gather()

    def predicted_traffic(
        self, numel: int, itemsize: int, *, num_workers: int, num_servers: int = 0
    ) -> Traffic:
        """Predicts the traffic of ONE mean of `numel` elements, by local rank."""

    def predicted_gather(self, num_bytes: int, *, num_workers: int) -> Traffic:
        """Predicts the traffic of ONE gather of `num_bytes` bytes per worker."""
        raise self._cannot_gather()

    def _cannot_gather(self) -> UsageError:
        """Makes the error for a compression that needs a gather from a topology without one."""
        return UsageError(
            f"{type(self).__module__} has no `gather`, which this compression needs: what it sends "
            "cannot be summed; give the topology one and say gathers = True, or set topology = "
            "native"
        )


class Graph(Protocol):
    """A gossip graph: who mixes with whom in a step.

    The mixing matrix W is doubly stochastic: W_ij is the weight of what rank i gets from rank j,
    and W_ii = 1 minus the other weights of the row. One file in `topology/`, a dataclass that
    inherits from this class.
    """

    payload_source: str = "counted"
    timing_free: bool = False
    by_host: bool = False
    owns_buffer: bool = False

    num_workers: int

    def start(self, comm: Comm, *, num_servers: int = 0) -> None:
        """Is called once on every rank."""

    def neighbours(self, step: int) -> list[tuple[int, float]]:
        """Lists whose parameters come to this rank in this step, and their weights W_ij.

        The pairs (rank, weight) are in rank order.
        """

    def listeners(self, step: int) -> list[int]:
        """Lists the ranks to which this rank's parameters go in this step, in rank order."""

    def edges(self, step: int, num_workers: int) -> list[tuple[int, int]]:
        """Lists all pairs (source, destination) of a step.

        A prediction asks for them, so this works on an instance that was never started.
        """


def lend_memory(topology: Topology, part: Part) -> None:
    """Puts a replica's gradient into the topology's own memory, where the topology has some.

    A strategy that reduces gradients calls it in its `start`, so that no copy is made per step.
    """
    if topology.owns_buffer and part.has_grad_buffer:
        part.use_grad_buffer(topology.buffer(part.grad.numel(), like=part.grad))


def bounds(numel: int, parts: int) -> list[tuple[int, int]]:
    """Cuts `numel` elements into `parts` consecutive ranges (start, stop).

    The first `numel % parts` ranges are one element longer than the others. Ranges are empty
    where there are fewer elements than parts; nothing is sent for an empty one.
    """
    quotient, remainder = divmod(numel, parts)

    result = []
    start = 0

    for part in range(parts):
        stop = start + quotient + (1 if part < remainder else 0)
        result.append((start, stop))
        start = stop

    return result


def segments(start: int, stop: int, length: int) -> list[tuple[int, int]]:
    """Cuts the range from `start` to `stop` into pieces of at most `length` elements."""
    return [(at, min(at + length, stop)) for at in range(start, stop, length)]


def rank_order_sum(rows: Sequence[Tensor], out: Tensor) -> None:
    """Adds rows[0] + rows[1] + ... into `out`, in exactly that order.

    Addition of floating-point numbers is not associative: a fixed order makes results repeat bit
    for bit, whoever was fast. `out` may be rows[0] itself.
    """
    if out is not rows[0]:
        out.copy_(rows[0])

    for row in rows[1:]:
        out.add_(row)


NUMBER_BYTES = 8  # one float64


def sum_number(
    comm: Comm, ranks: Sequence[int], value: float, *, device: torch.device | None = None
) -> float:
    """Sums one float64 of each of `ranks`, and returns the sum on all of them.

    The first of them adds in the order of `ranks` and sends the result to the others, so all have
    the same bits. Sends 2 (n-1) messages of 8 bytes for n ranks.
    """
    mine = torch.tensor([value], dtype=torch.float64, device=device)
    first, *others = ranks

    # All but the first give their number away, and get the sum back into the same place.
    if comm.rank != first:
        comm.send(mine, first)
        comm.recv(mine, first)
        return float(mine)

    # The first adds in a fixed order, whoever is ready first.
    other = torch.empty_like(mine)

    for rank in others:
        comm.recv(other, rank)
        mine.add_(other)

    for rank in others:
        comm.send(mine, rank)

    return float(mine)


def sum_number_traffic(ranks: Sequence[int]) -> Traffic:
    """Says what one call of `sum_number` puts on the wire."""
    traffic = Traffic()
    for rank in ranks[1:]:
        traffic.add(rank, ranks[0], NUMBER_BYTES)
        traffic.add(ranks[0], rank, NUMBER_BYTES)

    return traffic


def collective_traffic(
    kind: str, numel: int, itemsize: int, num_workers: int, *, backend: str = "gloo"
) -> Traffic:
    """Says what one of the library's collectives puts on the wire, for `numel` elements in all.

    An all_reduce costs what a ring does; an all_gather or a broadcast costs half of it. A
    reduce_scatter costs half of it too, except on gloo, which makes it out of an all-reduce.
    """
    # `longest` is the whole vector: how the library cuts it into messages is its own affair.
    if kind == "all_reduce" or (kind == "reduce_scatter" and backend == "gloo"):
        return ring_traffic(numel, itemsize, num_workers, longest=max(numel, 1))

    return spread_traffic(numel, itemsize, num_workers)


def spread_traffic(numel: int, itemsize: int, num_workers: int) -> Traffic:
    """Says what an all-gather or a broadcast of `numel` elements in all puts on the wire.

    It is the second half of a ring all-reduce, on the same edges.
    """
    # Both phases send the same bytes over the same edges.
    both = ring_traffic(numel, itemsize, num_workers, longest=max(numel, 1))

    return Traffic(
        {edge: num_bytes // 2 for edge, num_bytes in both.payload.items()},
        {edge: -(-count // 2) for edge, count in both.messages.items()},
    )


def ring_traffic(numel: int, itemsize: int, num_workers: int, *, longest: int) -> Traffic:
    """Says what one ring all-reduce puts on the wire.

    Rank i sends every chunk but one to rank i+1 in each of the two phases. `longest` is the most
    elements of one message; an empty chunk is not sent.
    """
    traffic = Traffic()
    ranges = bounds(numel, num_workers)

    # A single worker has nobody to send to.
    for rank in range(num_workers if num_workers > 1 else 0):
        # The reduce-scatter sends all chunks but rank+1, which ends here; the all-gather sends
        # all but rank+2, which the right neighbour has just finished itself.
        for kept in (rank + 1, rank + 2):
            for chunk, (start, stop) in enumerate(ranges):
                if chunk != kept % num_workers and stop > start:
                    num_messages = -(-(stop - start) // longest)
                    traffic.add(
                        rank, (rank + 1) % num_workers, (stop - start) * itemsize, num_messages
                    )

    return traffic
