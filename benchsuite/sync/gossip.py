"""Gossip, D-PSGD: every replica mixes its PARAMETERS with those of a few neighbours, and steps
(Lian et al. 2017).

arXiv 1705.09056, algorithm 1: x_i <- sum_j W_ij x_j - lr g_i(x_i), where the doubly stochastic W
is given by the topology (`ring_neighbours`, `exponential`, `random_matching`). Nobody ever holds
the mean of the replicas, which is what is evaluated. Averaging neighbours' gradients instead is
another method, and it diverges on unequal data.

Over a compression differences travel (CHOCO-SGD, Koloskova et al. 2019, arXiv 1902.00340): both
ends of an edge keep the copy of x that the receiver knows, Q(x - copy) is sent, and then
x_i += consensus_rate sum_j W_ij (copy of j - copy of i).

Sends d M bytes per step to d neighbours. Where receives may be posted ahead, parameters set out
before the gradient is computed and are hidden behind it. Keeps d M bytes of arrivals and M of the
mixture; over a compression also a copy per edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchsuite import sync
from benchsuite.comm import Comm, Handle, Traffic
from benchsuite.compression import Codec, Compression, pieces_of
from benchsuite.errors import UsageError
from benchsuite.sync import Events, Setting, Work, count
from benchsuite.sync.averaging import is_compressed
from benchsuite.topology import Graph, Topology
from benchsuite.update import Updater, clip
from benchsuite.workload import Batch, Part, Recipe, Shapes, numel


@dataclass
class Strategy(sync.Strategy):
    """Every replica mixes its parameters with its neighbours', and steps by itself.

    Nobody is at the centre: the load of a rank does not grow with their number.
    """

    consensus_rate: float = 1.0
    """How far a compressed exchange moves a replica towards its neighbours (CHOCO's gamma)."""

    timing_free = True
    snapshot_of = "mean"
    clips_mean = False
    goes_on = True
    state_is_a_bound = True  # which pairs will have met, a graph may leave to chance

    order = 7
    colour = "#332288"
    topologies = ("graph",)
    topologies_why = "it mixes with the neighbours of a graph"
    model_parallel = False
    takes_votes = False
    refuses = (
        {
            "rule": "consensus rate",
            "when": "not 0 < consensus_rate <= 1",
            "reason": "consensus_rate = {consensus_rate:g}: 0 < consensus_rate <= 1 is needed",
            "remedy": "set consensus_rate = 1",
        },
    )

    # -- a run -------------------------------------------------------------------------------------

    def start(
        self, comm: Comm, part: Part, recipe: Recipe, topology: Topology, compression: Compression
    ) -> None:
        self._comm = comm
        self._part = part
        self._recipe = recipe
        self._compression = compression
        self._graph: Graph = topology  # type: ignore[assignment]  # rules: gossip needs a graph

        self._rank = comm.rank
        self._num_workers = comm.size

        # Global batches of the budget, and how many of them are done.
        self._steps = recipe.budget // recipe.global_batch
        self._step = 0

        self.events = {"synchronisations": 0}
        self._updater = Updater(part.params, recipe, shapes=part.shapes)

        self._mixed = torch.empty_like(part.params)  # sum_j W_ij x_j, (P,)
        self._arrivals: list[Tensor] = []  # x_j of each neighbour, (P,), made when first needed

        # Where parameters are compressed: what the ends of this rank's edges know.
        self._copies = Copies(self, part, compression) if is_compressed(compression) else None

    def make_updater(self, params: Tensor) -> Updater:
        # No server is there to be given an updater.
        raise AssertionError("rules: gossip has no server")

    def next_index(self) -> Work | None:
        # Every worker has its own shard of the next global batch.
        if self._step == self._steps:
            return None

        return self._step, self._rank, self._num_workers

    def step(self, batch: Batch) -> float:
        """Computes g_i on x_i, mixes x_i with its neighbours', then steps by g_i."""
        part = self._part

        # x_i sets out before the gradient, which does not change it. Compressed differences are
        # exchanged in rounds, after it.
        under_way = self._set_out() if self._comm.posts_ahead and self._copies is None else None

        loss = part.gradient(batch)
        assert loss is not None
        clip(part.grad, self._recipe.clip_norm)

        # Algorithm 1 takes the gradient at x_i, not at the mixture: so it was computed before.
        self._mix(under_way)
        self._updater.step(part.grad, samples=self._step * self._recipe.global_batch)
        self._step += 1
        self.events["synchronisations"] += 1

        return loss

    def _set_out(self) -> list[Handle]:
        """Posts the receives and sends of this step, and returns what to wait for.

        The sends read the parameters themselves, which do not change before they are waited for.
        """
        neighbours = self._graph.neighbours(self._step)
        listeners = self._graph.listeners(self._step)

        while len(self._arrivals) < len(neighbours):
            self._arrivals.append(torch.empty_like(self._part.params))

        waiting: list[Handle] = [
            self._comm.irecv(arrival, rank)
            for arrival, (rank, _) in zip(self._arrivals, neighbours, strict=False)
        ]

        return waiting + [self._comm.isend(self._part.params, rank) for rank in listeners]

    def _mix(self, under_way: list[Handle] | None) -> None:
        """Replaces x_i by sum_j W_ij x_j; None: nothing has set out, so exchange first."""
        params = self._part.params
        if self._copies is not None:
            self._copies.exchange(self._step, self.consensus_rate)
            return

        neighbours = self._graph.neighbours(self._step)
        if under_way is None:
            self._exchange_in_rounds(neighbours)
        else:
            for handle in under_way:
                handle.wait()

        # W_ii is what the neighbours' weights leave over.
        torch.mul(params, 1.0 - sum(weight for _, weight in neighbours), out=self._mixed)

        for arrival, (_, weight) in zip(self._arrivals, neighbours, strict=False):
            self._mixed.add_(arrival, alpha=weight)

        params.copy_(self._mixed)

    def _exchange_in_rounds(self, neighbours: list[tuple[int, float]]) -> None:
        """Exchanges the parameters with neighbours and listeners where nothing is posted ahead."""
        while len(self._arrivals) < len(neighbours):
            self._arrivals.append(torch.empty_like(self._part.params))

        # The arrival vector of each neighbour, and the same parameters for every listener.
        pairs = dict(zip((rank for rank, _ in neighbours), self._arrivals, strict=False))
        outgoing = dict.fromkeys(self._graph.listeners(self._step), self._part.params)
        in_rounds(self._comm, outgoing, pairs)

    def finish(self) -> None:
        """Nothing is under way after a step."""

    def snapshot(self) -> Tensor:
        return self._part.params

    # -- predictions -------------------------------------------------------------------------------

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        # Who meets whom is no event: it follows from the graph and the number of the step.
        return {"synchronisations": [num_batches] * setting.num_workers}

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        """Gives an upper bound of the bytes that a replica keeps.

        A graph that changes from step to step has as many copies as pairs that have met, which a
        random one leaves to chance.
        """
        graph: Graph = setting.topology  # type: ignore[assignment]

        # More steps than the period of any graph that repeats itself.
        steps = range(2 * setting.num_workers)
        edges = {edge for step in steps for edge in graph.edges(step, setting.num_workers)}

        most = max(
            (
                sum(edge[1] == 0 for edge in graph.edges(step, setting.num_workers))
                for step in steps
            ),
            default=0,
        )

        # Compressed: a copy per edge of rank 0, x at the start, and the difference. Otherwise the
        # arrivals and the mixture.
        copies = sum(0 in edge for edge in edges)
        vectors = 2 + copies if is_compressed(setting.compression) else 1 + most

        return vectors * numel(shapes) * setting.itemsize

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        # The graph is asked again for every step of the run.
        traffic = Traffic()
        graph: Graph = setting.topology  # type: ignore[assignment]
        # Everything that travels over an edge has the same size, compressed or not.
        size = setting.compression.wire_bytes(pieces_of(shapes), setting.itemsize)

        for step in range(count(events, "synchronisations", 0)):
            for source, destination in graph.edges(step, setting.num_workers):
                traffic.add(source, destination, size)

        return traffic


class Copies:
    """The copies of parameters that the two ends of each edge share (CHOCO-SGD).

    Both ends begin with the same vector and move their copy by what was sent, decoded: so they
    stay alike bit for bit although only lossy differences travel.
    """

    def __init__(self, strategy: Strategy, part: Part, compression: Compression) -> None:
        self._strategy = strategy
        self._part = part
        self._compression = compression

        # The tensors' lengths in the flat vector: a codec works piece by piece.
        self._pieces = pieces_of(part.shapes)
        self._start = part.params.clone()  # equal on all ranks

        # By neighbour: what is known here of its parameters. By listener: what it knows of ours.
        self._known_of: dict[int, tuple[Tensor, Codec]] = {}
        self._known_to: dict[int, tuple[Tensor, Codec]] = {}

        self._difference = torch.empty_like(part.params)  # scratch (P,)

    def exchange(self, step: int, rate: float) -> None:
        """Makes one step of the graph: sends differences, moves copies, then the parameters.

        `rate` is CHOCO's gamma.
        """
        graph = self._strategy._graph
        params = self._part.params

        # Q(x_i - copy) for each listener, and room for what neighbours send.
        outgoing = {}
        incoming = {}

        for rank in graph.listeners(step):
            copy, codec = self._edge(self._known_to, rank)
            outgoing[rank] = codec.encode(torch.sub(params, copy, out=self._difference))

        neighbours = graph.neighbours(step)
        for rank, _ in neighbours:
            _, codec = self._edge(self._known_of, rank)
            # As many bytes as the neighbour's codec for the same pieces makes.
            incoming[rank] = torch.empty(codec.num_bytes, dtype=torch.uint8)

        in_rounds(self._strategy._comm, outgoing, incoming)

        # Our own copies move by the decoded bytes too, not by the exact difference: otherwise the
        # two ends of an edge would drift apart.

        for rank, wire in outgoing.items():
            self._move(self._known_to[rank], wire)

        for rank, wire in incoming.items():
            self._move(self._known_of[rank], wire)

        weight = _the_weight(neighbours)  # W_ij of every edge of this step

        # Every edge takes from one end what it gives to the other: the sum over replicas is kept.
        for rank in incoming:
            params.add_(self._known_of[rank][0], alpha=rate * weight)

        for rank in outgoing:
            params.sub_(self._known_to[rank][0], alpha=rate * weight)

    def _edge(self, edges: dict[int, tuple[Tensor, Codec]], rank: int) -> tuple[Tensor, Codec]:
        """Gives the copy and the codec of an edge, which begin with the first step it is in."""
        if rank not in edges:
            # No error feedback: what one difference leaves over is in the next difference anyway.
            codec = self._compression.codec(self._pieces, self._start.dtype, feedback=False)
            edges[rank] = (self._start.clone(), codec)

        return edges[rank]

    def _move(self, edge: tuple[Tensor, Codec], wire: Tensor) -> None:
        """Moves a copy by what was sent."""
        copy, codec = edge
        codec.decode(wire, self._difference)
        copy.add_(self._difference)


def _the_weight(neighbours: list[tuple[int, float]]) -> float:
    """Gives the weight that all neighbours have in a step; UsageError where they differ.

    A replica knows the weights W_ij of what it takes, but not those of what it gives. Only where
    all are the same does it give a listener what that one takes.
    """
    weights = {weight for _, weight in neighbours}
    if len(weights) > 1:
        raise UsageError(
            f"weights {sorted(weights)} in one step of the graph: compressed gossip needs one for "
            "all neighbours; use "
            " compression = none, or another graph"
        )

    return weights.pop() if weights else 0.0


def in_rounds(comm: Comm, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> None:
    """Exchanges vectors with several ranks, distance by distance around the circle.

    `outgoing` and `incoming` are by rank. In each round everybody sends to the rank at the same
    distance, so that sends and receives match on every backend and nobody waits in a circle.
    """
    for distance in range(1, comm.size):
        to = (comm.rank + distance) % comm.size
        source = (comm.rank - distance) % comm.size
        # A graph may have an edge one way only, so a round may be half a pair.
        if to in outgoing and source in incoming:
            comm.sendrecv(outgoing[to], to, incoming[source], source)
        elif to in outgoing:
            comm.send(outgoing[to], to)
        elif source in incoming:
            comm.recv(incoming[source], source)
