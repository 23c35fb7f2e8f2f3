"""How vectors travel: `Topology`, and the arithmetic that several of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from benchsuite.comm import Comm, Traffic


class Topology(Protocol):
    """A reducing topology. A parameter server has `exchange` and `serve` besides (topology/parameter_server.py);
    a gossip graph has `neighbours(step) -> [(rank, weight)]` instead of `mean`."""

    num_workers: int

    def start(self, comm: Comm, *, num_servers: int = 0) -> None:
        """Called once on every rank; the last `num_servers` ranks are servers."""

    def buffer(self, numel: int, like: Tensor) -> Tensor:
        """Where the flat gradient should live (default: ordinary memory)."""

    def mean(self, flat: Tensor) -> None:
        """Replaces `flat` by its mean over the workers, in place, the same bits on all. Sums first, divides once."""

    def predicted_traffic(self, numel: int, itemsize: int, *, num_workers: int, num_servers: int = 0) -> Traffic:
        """Traffic of ONE mean, by local rank."""


def bounds(numel: int, parts: int) -> list[tuple[int, int]]:
    """`parts` consecutive ranges that cover `numel` elements; the first `numel % parts` are one longer.

    Empty ranges are possible (numel < parts); nothing is sent for them.
    """
    quotient, remainder = divmod(numel, parts)
    result, start = [], 0
    for part in range(parts):
        stop = start + quotient + (1 if part < remainder else 0)
        result.append((start, stop))
        start = stop
    return result


def segments(start: int, stop: int, length: int) -> list[tuple[int, int]]:
    """A range cut into pieces of at most `length` elements."""
    return [(at, min(at + length, stop)) for at in range(start, stop, length)]


def rank_order_sum(rows: Sequence[Tensor], out: Tensor) -> None:
    """`out` = rows[0] + rows[1] + ... in that order, so that results repeat bit for bit. `out` may be rows[0]."""
    if out is not rows[0]:
        out.copy_(rows[0])
    for row in rows[1:]:
        out.add_(row)


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
                    traffic.add(rank, (rank + 1) % num_workers, (stop - start) * itemsize, num_messages)
    return traffic
