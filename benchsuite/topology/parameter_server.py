"""Parameter server: the centralised synchronisation of the article's section 3.3.1 (Li et al. 2014,
Dean et al. 2012).

The last S >= 1 ranks are servers, and server j owns slice j of the parameters and of the optimiser
state. A worker pushes a gradient and is answered with parameters. Which pushes are applied when,
and who is answered when, is all that a strategy decides, by its `ServerPolicy`; the one server
loop is `topology/serving.py`. A ticket goes ahead of each push, so that the server knows whom to
receive from: that works on every backend, also where one cannot receive from anybody.

Sends M bytes and S messages each way per worker and step; N * M/S each way go through each server's
port.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite import topology
from benchsuite.comm import ABANDONED, GOODBYE, Comm, Handle, Traffic
from benchsuite.comm.codec import Codec, Encoding
from benchsuite.topology import bounds, sum_number, sum_number_traffic
from benchsuite.topology.policy import ServerPolicy, Steps
from benchsuite.topology.server_log import ServerLog
from benchsuite.topology.serving import ServerLoop
from benchsuite.workload import Shapes, numel, pieces_of


@dataclass
class Topology(topology.Topology):
    """Workers push to servers and are answered with parameters.

    The methods come in three groups: what both sides set up, what a worker calls, and `serve`.
    """

    timing_free = True  # whether a policy is, its strategy says
    kind = "server"
    label = "parameter server"
    short_label = "server"
    order = 6
    num_workers = 0
    num_servers = 1
    # Bytes of a push that is no slice of a vector but a strategy's own, to its one server. A
    # strategy sets it in its `start`; 0 = pushes are slices.
    push_bytes = 0

    def start(self, comm: Comm, *, num_servers: int = 1) -> None:
        assert 0 < num_servers < comm.size, "rules: at least one server and one worker"
        self._comm = comm
        self.world_ranks = comm.world_ranks
        self.num_servers = num_servers
        self.num_workers = comm.size - num_servers
        self.server = comm.rank - self.num_workers  # number of this server; negative on a worker
        self.use_threads(1)  # a strategy without a lock asks for more, in its own `start`

        # One codec per server, where pushes are encoded.
        self._codecs: list[Codec] = []
        self._compression: Encoding | None = None

        # Elements of the slice that count for norms (None = all), and what adds the square sums
        # of the parts of divided replicas.
        self._owned: int | None = None
        self._sum_over_parts: Callable[[float], float] = float

    def one_of_parts(self, owned: int, total: Callable[[float], float]) -> None:
        """Tells a server that its replicas are divided, so its norms are sums over their parts.

        The first `owned` elements of this server's slice count, because parameters that every
        part holds count once; `total` adds up what the servers of the other parts have.
        """
        self._owned = owned
        self._sum_over_parts = total

    def use_compression(self, compression: Encoding, shapes: Shapes, dtype: torch.dtype) -> None:
        """Lets workers encode their pushes, and the server's loop decode them.

        Called on every rank after `start`. Each slice is a vector of its own, with its own
        residual. Answers travel as they are.
        """
        # A codec works on one slice, piece by piece of the tensors that lie in it.
        size = numel(shapes)
        slices = [self.slice_of(server, size) for server in range(self.num_servers)]
        self._codecs = [
            compression.codec(pieces_of(shapes, start, stop), dtype) for start, stop in slices
        ]
        self._compression = compression

    @property
    def codec(self) -> Codec | None:
        """The codec of this server's slice; None where pushes come as they are."""
        return self._codecs[self.server] if self._codecs else None

    def settle(self, mean: Tensor) -> None:
        """Changes a mean of pushes before it is applied, in place, as the compression wants it.

        A majority vote, for example, is made of the mean of signs.
        """
        if self._compression is not None:
            self._compression.settle(mean)

    def use_threads(self, num_threads: int) -> None:
        """Serves with so many threads: worker w belongs to thread w % num_threads.

        A strategy without a lock calls it on every rank, in its `start`. Each thread has a group
        of its own with its workers, because two threads may not receive on one; a single thread
        uses the comm itself.
        """
        self.num_threads = num_threads

        # By server and thread; None = this rank is not in that group.
        self._doors: list[list[Comm | None]] = []

        for server in range(self.num_servers):
            if num_threads == 1:
                self._doors.append([self._comm])
                continue

            ranks = [
                [w for w in range(self.num_workers) if w % num_threads == t]
                for t in range(num_threads)
            ]

            self._doors.append(
                [self._comm.split([*workers, self.num_workers + server]) for workers in ranks]
            )

    def slice_of(self, server: int, numel: int) -> tuple[int, int]:
        """Gives the range (start, stop) of the flat vector that `server` owns."""
        return bounds(numel, self.num_servers)[server]

    # -- worker ------------------------------------------------------------------------------------

    def exchange(self, push: Tensor, pull: Tensor, *, tag: int) -> None:
        """Sends `push` (P,) and receives the answer into `pull` (P,); returns when both are done.

        `tag` (>= 0), the number of the batch, goes into the servers' push log.
        """
        # Where receives may be posted ahead, the answer has a place to go before it is asked for.
        ahead = self._comm.posts_ahead
        waiting = self.expect(pull) if ahead else []
        waiting += self.push(push, tag=tag)

        # NCCL runs the operations of a pair in posting order: a receive that is posted first
        # would wait for an answer to a push that is never sent.
        if not ahead:
            waiting += self.expect(pull)

        for handle in waiting:
            handle.wait()

    def push(self, flat: Tensor, *, tag: int) -> list[Handle]:
        """Sends a whole vector (P,), each server its slice, and does not wait.

        The vector may not change before the handles are done.
        """
        sending = []
        for server, (start, stop) in enumerate(bounds(flat.numel(), self.num_servers)):
            door, dst = self._door(server)

            # The ticket goes to a server with an empty slice as well: its policy counts pushes.
            door.ticket(dst, tag)
            if stop > start:
                piece = flat[start:stop]
                wire = self._codecs[server].encode(piece) if self._codecs else piece
                sending.append(door.isend(wire, dst))

        return sending

    def expect(self, pull: Tensor) -> list[Handle]:
        """Posts the receives of the next answer into `pull` (P,), one per server."""
        receiving = []
        for server, (start, stop) in enumerate(bounds(pull.numel(), self.num_servers)):
            door, dst = self._door(server)
            if stop > start:
                receiving.append(door.irecv(pull[start:stop], dst))

        return receiving

    def abandon(self) -> None:
        """Tells every server that the gradient which this worker had begun will not come."""
        for server in range(self.num_servers):
            door, dst = self._door(server)
            door.ticket(dst, ABANDONED)

    def mean(self, flat: Tensor) -> None:
        """Replaces `flat` (P,) by the mean over the workers.

        The servers' policy must be one that averages and answers with the mean.
        """
        self.exchange(flat, flat, tag=0)

    def goodbye(self) -> None:
        """Tells every server that this worker sends no more."""
        for server in range(self.num_servers):
            door, dst = self._door(server)
            door.ticket(dst, GOODBYE)
            # The server may have posted the receive of a next push already; the farewell fills it,
            # so that it takes no later message.
            if door.early_bytes:
                door.farewell(dst)

    def _door(self, server: int) -> tuple[Comm, int]:
        """Gives the group in which this worker talks to a server, and the server's rank there."""
        # Of the threads' groups a worker is in one, by its number; the server is the last rank.
        door = self._doors[server][
            self._comm.rank % self.num_threads if self.num_threads > 1 else 0
        ]
        assert door is not None
        return door, (self.num_workers + server if self.num_threads == 1 else door.size - 1)

    # -- server ------------------------------------------------------------------------------------

    def serve(
        self,
        shard: Tensor,
        make_updater: Callable[[], Steps],
        policy: ServerPolicy,
        *,
        samples_per_push: float,
        num_pushes: int,
        clip_norm: float | None = None,
        on_update: Callable[[int, int], None] | None = None,
        survives: bool = False,
    ) -> ServerLog:
        """Serves until every worker has said goodbye, and returns the log of the pushes.

        shard: this server's slice of the parameters, which is stepped in place.
        make_updater: makes an optimiser for the slice; each thread gets one.
        clip_norm: given where the policy applies means; the norm is over all servers' slices.
        on_update: called with (samples, version) after each optimiser step.
        survives: a worker whose connection breaks is taken as one that said goodbye.
        """
        loop = ServerLoop(
            self,
            shard,
            make_updater,
            policy,
            samples_per_push=samples_per_push,
            num_pushes=num_pushes,
            clip_norm=clip_norm,
            on_update=on_update,
            survives=survives,
        )

        # This server's groups; one without a worker has nobody to serve.
        comms = [comm for comm in self._doors[self.server] if comm is not None and comm.size > 1]
        threads = [
            threading.Thread(target=loop.guarded, args=(comm,), daemon=True) for comm in comms[1:]
        ]

        # The main thread serves the first group, one more thread each of the others.
        for thread in threads:
            thread.start()

        loop.guarded(comms[0])

        for thread in threads:
            thread.join()

        loop.close()

        # The first error is the cause; those of other threads follow from it.
        if loop.errors:
            raise loop.errors[0]

        loop.log.events = dict(policy.events or {})
        loop.log.losses = policy.losses

        return loop.log

    def square_sum(self, gradient: Tensor) -> float:
        """Sums the squares of the whole mean gradient, of which `gradient` is this server's slice.

        All servers call it at the same step, and all get the same bits.
        """
        # What several parts hold counts on one of them only.
        owned = gradient[: self._owned]

        servers = range(self.num_workers, self._comm.size)

        return self._sum_over_parts(sum_number(self._comm, servers, float(torch.dot(owned, owned))))

    # -- predictions -------------------------------------------------------------------------------

    def predicted_traffic(
        self, numel: int, itemsize: int, *, num_workers: int, num_servers: int = 1
    ) -> Traffic:
        """Predicts one exchange of every worker: 2 N M bytes in all."""
        # One push and one answer of every worker, a slice to and from every server.
        ones = [1] * num_workers
        size = [(stop - start) * itemsize for start, stop in bounds(numel, num_servers)]

        return sized_traffic(size, size, pushes=ones, replies=ones)


def sized_traffic(
    push_bytes: Sequence[int],
    reply_bytes: Sequence[int],
    *,
    pushes: Sequence[int],
    replies: Sequence[int],
) -> Traffic:
    """Says what pushes and replies put on the wire.

    `push_bytes` and `reply_bytes` have the size of one by server, `pushes` and `replies` their
    number by worker. What belongs to an empty slice is not sent.
    """
    traffic = Traffic()
    num_workers = len(pushes)

    for server, (push, reply) in enumerate(zip(push_bytes, reply_bytes, strict=True)):
        for worker in range(num_workers if reply else 0):
            rank = num_workers + server
            if pushes[worker]:
                traffic.add(worker, rank, push * pushes[worker], pushes[worker])

            if replies[worker]:
                traffic.add(rank, worker, reply * replies[worker], replies[worker])

    return traffic


def clip_traffic(num_workers: int, num_servers: int, times: int) -> Traffic:
    """Says what the servers send to agree on the norm of a mean gradient, `times` times."""
    return sum_number_traffic(range(num_workers, num_workers + num_servers)).times(times)
