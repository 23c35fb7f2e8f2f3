"""Direct all-reduce: a parameter server sharded over the workers themselves (BytePS, Jiang et al.
2020, co-located).

The vector is cut into N chunks, and worker r owns chunk r. Everybody sends each chunk straight to
its owner; the owner adds in rank order, divides once, and sends the mean straight to all. The
result is two messages away, however many workers there are.

Sends 2 (N-1)/N * M bytes and 2 (N-1) messages per rank and step. `scatter` and `gather` are the
two halves, and they take vectors of any type: compressions use them for bytes.
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
    """Chunks go straight to their owners, and straight back.

    Few rounds and small messages, but every rank talks to every other one.
    """

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

        # Kept from call to call, because a step asks for the same sizes again.
        self._scratch: dict[tuple[str, int, int, torch.dtype], Tensor] = {}

    def mean(self, flat: Tensor) -> None:
        """Replaces `flat` (P,) by the mean over the workers."""
        # A single worker's vector is its own mean.
        if self.num_workers == 1:
            return

        ranges = bounds(flat.numel(), self.num_workers)
        chunks = [flat[start:stop] for start, stop in ranges]  # N views of about (P/N,)
        mine = chunks[self._comm.rank]

        # Reduce: this rank gets its own chunk from all. The sum goes into rank 0's row, which is
        # scratch, or on rank 0 its own chunk: in both cases nobody reads it later.
        rows = self.scatter(chunks)
        rank_order_sum(rows, rows[0])
        torch.div(rows[0], self.num_workers, out=mine)

        # Spread: the finished chunk goes to all, and theirs come to where they belong.
        self._exchange([mine] * self.num_workers, chunks)

    def scatter(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Sends piece r to rank r, and returns what every rank sent to this one, in rank order.

        This rank's own piece is among what is returned. All pieces for one rank have the same
        size, those for different ranks need not. What is returned is scratch memory, good until
        the next `scatter`.
        """
        mine = pieces[self._comm.rank]  # (C,)

        # N rows of (C,), of which this rank's own is its piece and not a copy of it.
        rows = [self._row("scatter", rank, mine.numel(), mine) for rank in range(self.num_workers)]
        rows[self._comm.rank] = mine
        self._exchange(pieces, rows)

        return rows

    def gather(self, wire: Tensor, sizes: Sequence[int] = ()) -> list[Tensor]:
        """Returns every worker's vector, in rank order; `sizes` has their lengths if they differ.

        What is returned is scratch memory, good until the next `gather`.
        """
        # As many rows as ranks; this rank's own is its vector and not a copy of it.
        lengths = sizes or [wire.numel()] * self.num_workers
        rows = [self._row("gather", rank, length, wire) for rank, length in enumerate(lengths)]
        rows[self._comm.rank] = wire
        self._exchange([wire] * self.num_workers, rows)

        return rows

    def _row(self, half: str, rank: int, numel: int, like: Tensor) -> Tensor:
        """Gives the scratch vector for what `rank` sends in this half of the exchange."""
        key = (half, rank, numel, like.dtype)

        # One vector per sender: all of them arrive before the first is added.
        if key not in self._scratch:
            self._scratch[key] = torch.empty(numel, dtype=like.dtype, device=like.device)

        return self._scratch[key]

    def _exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        """Sends outgoing[r] to rank r and receives incoming[r] from it; an empty one is left out.

        In round k a rank sends to the k-th rank on its right and receives from the k-th on its
        left. If all began with rank 0 instead, N-1 vectors would meet at its port at once while
        the other ports were idle.
        """
        comm = self._comm
        size = self.num_workers
        # (destination, source) of each round
        rounds = [((comm.rank + k) % size, (comm.rank - k) % size) for k in range(1, size)]

        if comm.posts_ahead:
            # Receives are posted before sends, so that nothing arrives without a place to go.
            # All rounds are under way at once, and the order only says who is served first.
            receiving = [
                comm.irecv(incoming[src], src) for _, src in rounds if incoming[src].numel()
            ]
            sending = [comm.isend(outgoing[dst], dst) for dst, _ in rounds if outgoing[dst].numel()]

            for handle in (*receiving, *sending):
                handle.wait()

            return

        # NCCL runs the operations of a pair in posting order: one round after the other.
        for dst, src in rounds:
            # Chunks may be empty where there are fewer elements than ranks.
            if outgoing[dst].numel() and incoming[src].numel():
                comm.sendrecv(outgoing[dst], dst, incoming[src], src)
            elif outgoing[dst].numel():
                comm.send(outgoing[dst], dst)
            elif incoming[src].numel():
                comm.recv(incoming[src], src)

    # -- predictions -------------------------------------------------------------------------------

    def predicted_traffic(
        self, numel: int, itemsize: int, *, num_workers: int, num_servers: int = 0
    ) -> Traffic:
        # One scatter of the chunks and one gather of them; sizes has the bytes of each chunk.
        sizes = [(stop - start) * itemsize for start, stop in bounds(numel, num_workers)]
        return self.predicted_scatter(sizes) + self.predicted_gather(sizes, num_workers=num_workers)

    def predicted_scatter(self, num_bytes: Sequence[int]) -> Traffic:
        """Predicts the traffic of ONE scatter: each of the others sends num_bytes[r] to rank r."""
        return _straight(num_bytes, to_owner=True)

    def predicted_gather(self, num_bytes: int | Sequence[int], *, num_workers: int) -> Traffic:
        """Predicts the traffic of ONE gather.

        `num_bytes` is what every worker gives; a sequence has what worker r gives at position r.
        """
        # What a rank gives goes to each of the others.
        sizes = [num_bytes] * num_workers if isinstance(num_bytes, int) else num_bytes
        return _straight(sizes, to_owner=False)


def _straight(num_bytes: Sequence[int], *, to_owner: bool) -> Traffic:
    """Counts one message between every owner of something and each of the others.

    num_bytes[r] is the size of what rank r owns; `to_owner` says which way it goes.
    """
    traffic = Traffic()

    # What is empty is not sent.
    for owner, count in enumerate(num_bytes):
        for other in range(len(num_bytes) if count else 0):
            if other != owner:
                edge = (other, owner) if to_owner else (owner, other)
                traffic.add(*edge, count)

    return traffic
