"""Direct all-reduce: a parameter server sharded over the workers themselves (BytePS, Jiang et al.
2020, co-located).

The vector is cut into N chunks, worker r owns chunk r. Everybody sends each chunk straight to its
owner; the owner adds in rank order, divides once and sends the mean straight to all. Two messages
deep, however many workers. Sends 2 (N-1)/N * M bytes, 2 (N-1) messages. `scatter` and `gather` are
its two halves, for vectors of any type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite import topology
from benchsuite.comm import Comm, Traffic
from benchsuite.topology import bounds, rank_order_sum


@dataclass
class Topology(topology.Topology):
    """Chunks straight to their owners, and straight back."""

    timing_free = True
    gathers = True
    scatters = True
    kind = "collective"
    order = 4
    all_to_all = True
    num_workers = 0
    num_servers = 0

    def start(self, comm: Comm, *, num_servers: int = 0) -> None:
        assert num_servers == 0, "rules: servers need parameter_server"
        self._comm = comm
        self.num_workers = comm.size
        self.rank = comm.rank
        self._scratch: dict[tuple[str, int, int, torch.dtype], Tensor] = {}

    def mean(self, flat: Tensor) -> None:
        if self.num_workers == 1:
            return

        ranges = bounds(flat.numel(), self.num_workers)
        chunks = [flat[start:stop] for start, stop in ranges]
        mine = chunks[self._comm.rank]
        rows = self.scatter(chunks)
        rank_order_sum(rows, rows[0])  # rank 0's row is scratch, or rank 0's own chunk
        torch.div(rows[0], self.num_workers, out=mine)
        self._exchange([mine] * self.num_workers, chunks)

    def scatter(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Piece r goes to rank r; returns what every rank sent to this one (its own piece
        included), in rank order.

        All pieces for one rank have the same size, those for different ranks need not. What is
        returned is scratch, good until the next `scatter`.
        """
        mine = pieces[self._comm.rank]
        rows = [self._row("scatter", rank, mine.numel(), mine) for rank in range(self.num_workers)]
        rows[self._comm.rank] = mine
        self._exchange(pieces, rows)

        return rows

    def gather(self, wire: Tensor, sizes: Sequence[int] = ()) -> list[Tensor]:
        """Every worker's vector, in rank order; `sizes`: their lengths, where they differ. Good
        until the next one.
        """
        lengths = sizes or [wire.numel()] * self.num_workers
        rows = [self._row("gather", rank, length, wire) for rank, length in enumerate(lengths)]
        rows[self._comm.rank] = wire
        self._exchange([wire] * self.num_workers, rows)

        return rows

    def _row(self, half: str, rank: int, numel: int, like: Tensor) -> Tensor:
        key = (half, rank, numel, like.dtype)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(numel, dtype=like.dtype, device=like.device)

        return self._scratch[key]

    def _exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        """outgoing[r] to rank r, incoming[r] from rank r, nothing for an empty vector.

        In round k to the k-th on the right, from the k-th on the left: no port gets two vectors at
        once.
        """
        comm = self._comm
        size = self.num_workers
        rounds = [((comm.rank + k) % size, (comm.rank - k) % size) for k in range(1, size)]
        if comm.posts_ahead:
            receiving = [
                comm.irecv(incoming[src], src) for _, src in rounds if incoming[src].numel()
            ]
            sending = [comm.isend(outgoing[dst], dst) for dst, _ in rounds if outgoing[dst].numel()]
            for handle in (*receiving, *sending):
                handle.wait()

            return

        for dst, src in rounds:
            if outgoing[dst].numel() and incoming[src].numel():
                comm.sendrecv(outgoing[dst], dst, incoming[src], src)
            elif outgoing[dst].numel():
                comm.send(outgoing[dst], dst)
            elif incoming[src].numel():
                comm.recv(incoming[src], src)

    # -- costs -------------------------------------------------------------------------------------

    def predicted_traffic(
        self, numel: int, itemsize: int, *, num_workers: int, num_servers: int = 0
    ) -> Traffic:
        sizes = [(stop - start) * itemsize for start, stop in bounds(numel, num_workers)]
        return self.predicted_scatter(sizes) + self.predicted_gather(sizes, num_workers=num_workers)

    def predicted_scatter(self, num_bytes: Sequence[int]) -> Traffic:
        """Traffic of ONE scatter: num_bytes[r] to rank r from each of the others."""
        return _straight(num_bytes, to_owner=True)

    def predicted_gather(self, num_bytes: int | Sequence[int], *, num_workers: int) -> Traffic:
        """Traffic of ONE gather of so many bytes from every worker, or num_bytes[r] from worker
        r.
        """
        sizes = [num_bytes] * num_workers if isinstance(num_bytes, int) else num_bytes
        return _straight(sizes, to_owner=False)


def _straight(num_bytes: Sequence[int], *, to_owner: bool) -> Traffic:
    """One message between every owner of something and everybody else."""
    traffic = Traffic()
    for owner, count in enumerate(num_bytes):
        for other in range(len(num_bytes) if count else 0):
            if other != owner:
                traffic.add(*((other, owner) if to_owner else (owner, other)), count)

    return traffic
