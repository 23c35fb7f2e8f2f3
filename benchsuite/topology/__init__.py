"""How vectors travel: `Topology`, and the arithmetic that several of them share."""

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
        """ "counted" (our own sends) or "derived" (calls of the library)."""
        return "counted"

    timing_free: bool = False
    """Whether what is added does not depend on who is fast."""

    by_host: bool = False
    """Whether what is added first depends on the hosts of the ranks: `place` is called then."""

    owns_buffer: bool = False
    """Whether a gradient that lives in `buffer` is reduced where it is."""

    gathers: bool = False
    """Whether it has `gather`, which spreads whole vectors of bytes."""

    scatters: bool = False
    """Whether it has `scatter`, the first half of a mean, on vectors of bytes."""

    num_workers: int

    def start(self, comm: Comm, *, num_servers: int = 0) -> None:
        """Called once on every rank; the last `num_servers` ranks are servers."""

    def place(self, hosts: Sequence[int]) -> None:
        """Told before `start` and before predictions where `by_host`: the host of every rank."""
        return

    def second(self) -> Topology:
        """A fresh instance with the same options, not started: a lane has a group of its own."""
        return dataclasses.replace(self)  # type: ignore[type-var]  # members are dataclasses

    def buffer(self, numel: int, like: Tensor) -> Tensor:
        """Where the flat gradient should live (default: ordinary memory)."""
        return torch.zeros(numel, dtype=like.dtype, device=like.device)

    def mean(self, flat: Tensor) -> None:
        """Replaces `flat` by its mean over the workers, in place, the same bits on all. Sums first,
        divides once.
        """

    def gather(self, wire: Tensor) -> list[Tensor]:
        """Every worker's vector of bytes (all of one size), in rank order. Only where `gathers`."""
        raise self._cannot_gather()

    def predicted_traffic(
        self, numel: int, itemsize: int, *, num_workers: int, num_servers: int = 0
    ) -> Traffic:
        """Traffic of ONE mean, by local rank."""

    def predicted_gather(self, num_bytes: int, *, num_workers: int) -> Traffic:
        """Traffic of ONE gather of so many bytes per worker."""
        raise self._cannot_gather()

    def _cannot_gather(self) -> UsageError:
        return UsageError(
            f"{type(self).__module__} has no `gather`, which this compression needs: what it sends "
            "cannot be summed; give the topology one and say gathers = True, or set topology = "
            "native"
        )


class Graph(Protocol):
    """Who mixes with whom in a step of gossip. W is doubly stochastic: W_ij is the weight of what i
    gets from j, and W_ii = 1 minus the others.
    """

    payload_source: str = "counted"
    timing_free: bool = False
    by_host: bool = False
    owns_buffer: bool = False

    num_workers: int

    def start(self, comm: Comm, *, num_servers: int = 0) -> None:
        """Called once on every rank."""

    def neighbours(self, step: int) -> list[tuple[int, float]]:
        """(rank, weight) of those whose parameters come to this rank in this step, in rank
        order.
        """

    def listeners(self, step: int) -> list[int]:
        """The ranks to which this rank's parameters go in this step, in rank order."""

    def edges(self, step: int, num_workers: int) -> list[tuple[int, int]]:
        """(source, destination) of all of them, without being started: for a prediction."""


def lend_memory(topology: Topology, part: Part) -> None:
    """Lets the gradient of a real replica live in the memory of a topology that has some: for who
    reduces gradients.
    """
    if topology.owns_buffer and hasattr(part, "use_grad_buffer"):
        part.use_grad_buffer(topology.buffer(part.grad.numel(), like=part.grad))


def bounds(numel: int, parts: int) -> list[tuple[int, int]]:
    """`parts` consecutive ranges that cover `numel` elements; the first `numel % parts` are one
    longer.

    Empty ranges are possible (numel < parts); nothing is sent for them.
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
    """A range cut into pieces of at most `length` elements."""
    return [(at, min(at + length, stop)) for at in range(start, stop, length)]


def rank_order_sum(rows: Sequence[Tensor], out: Tensor) -> None:
    """`out` = rows[0] + rows[1] + ... in that order, so that results repeat bit for bit. `out` may
    be rows[0].
    """
    if out is not rows[0]:
        out.copy_(rows[0])

    for row in rows[1:]:
        out.add_(row)


NUMBER_BYTES = 8  # one float64


def sum_number(
    comm: Comm, ranks: Sequence[int], value: float, *, device: torch.device | None = None
) -> float:
    """Sum of one float64 of each of `ranks`, on all of them, added in their order by the first: the
    same bits.

    2 (n-1) messages of 8 bytes.
    """
    mine = torch.tensor([value], dtype=torch.float64, device=device)
    first, *others = ranks
    if comm.rank != first:
        comm.send(mine, first)
        comm.recv(mine, first)
        return float(mine)

    other = torch.empty_like(mine)

    for rank in others:
        comm.recv(other, rank)
        mine.add_(other)

    for rank in others:
        comm.send(mine, rank)

    return float(mine)


def sum_number_traffic(ranks: Sequence[int]) -> Traffic:
    """Of one `sum_number`."""
    traffic = Traffic()
    for rank in ranks[1:]:
        traffic.add(rank, ranks[0], NUMBER_BYTES)
        traffic.add(ranks[0], rank, NUMBER_BYTES)

    return traffic


def collective_traffic(
    kind: str, numel: int, itemsize: int, num_workers: int, *, backend: str = "gloo"
) -> Traffic:
    """Of one of the library's collectives on a vector of `numel` elements in all.

    kind: all_reduce, a ring; all_gather or broadcast, half of it; reduce_scatter, half too, but on
    gloo a whole.
    """
    if kind == "all_reduce" or (kind == "reduce_scatter" and backend == "gloo"):
        return ring_traffic(numel, itemsize, num_workers, longest=max(numel, 1))

    return spread_traffic(numel, itemsize, num_workers)


def spread_traffic(numel: int, itemsize: int, num_workers: int) -> Traffic:
    """A gather of so many elements in all, or their broadcast: half of a ring all-reduce, on the
    same edges.
    """
    both = ring_traffic(numel, itemsize, num_workers, longest=max(numel, 1))

    return Traffic(
        {edge: num_bytes // 2 for edge, num_bytes in both.payload.items()},
        {edge: -(-count // 2) for edge, count in both.messages.items()},
    )


def ring_traffic(numel: int, itemsize: int, num_workers: int, *, longest: int) -> Traffic:
    """One ring all-reduce: rank i sends every chunk but one to i+1 in each of the two phases.

    `longest` is the most elements of one message; an empty chunk is not sent.
    """
    traffic = Traffic()
    ranges = bounds(numel, num_workers)

    for rank in range(num_workers if num_workers > 1 else 0):
        # reduce-scatter sends all chunks but rank+1 (which ends here); all-gather all but rank+2
        for kept in (rank + 1, rank + 2):
            for chunk, (start, stop) in enumerate(ranges):
                if chunk != kept % num_workers and stop > start:
                    num_messages = -(-(stop - start) // longest)
                    traffic.add(
                        rank, (rank + 1) % num_workers, (stop - start) * itemsize, num_messages
                    )

    return traffic
