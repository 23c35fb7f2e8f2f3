"""Gossip, D-PSGD: every replica mixes its PARAMETERS with those of a few neighbours, and steps
(Lian et al. 2017).

arXiv 1705.09056, algorithm 1: x_i <- sum_j W_ij x_j - lr g_i(x_i), W doubly stochastic, given by
the topology (`ring_neighbours`, `exponential`, `random_matching`). Nobody ever holds the mean; what
counts is the mean of the replicas. (Averaging neighbours' gradients instead is not this, and
diverges on unequal data.) Over a compression differences travel (CHOCO-SGD, Koloskova et al. 2019,
arXiv 1902.00340): both ends of an edge keep the copy that the receiver knows, Q(x - copy) is sent,
and x_i += consensus_rate sum_j W_ij (copy of j - copy of i). Parameters set out before the gradient
is computed where receives may be posted ahead: they are hidden behind it. Sends d M bytes per step
to d neighbours. Keeps d M of arrivals and M of the mixture; compressed, also a copy per edge.
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
    """Mixes with neighbours."""

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
        self._steps = recipe.budget // recipe.global_batch
        self._step = 0
        self.events = {"synchronisations": 0}
        self._updater = Updater(part.params, recipe, shapes=part.shapes)
        self._mixed = torch.empty_like(part.params)
        self._arrivals: list[Tensor] = []
        self._copies = Copies(self, part, compression) if is_compressed(compression) else None

    def make_updater(self, params: Tensor) -> Updater:
        raise AssertionError("rules: gossip has no server")

    def next_index(self) -> Work | None:
        return None if self._step == self._steps else (self._step, self._rank, self._num_workers)

    def step(self, batch: Batch) -> float:
        part = self._part
        under_way = self._set_out() if self._comm.posts_ahead and self._copies is None else None
        loss = part.gradient(batch)
        assert loss is not None
        clip(part.grad, self._recipe.clip_norm)
        self._mix(under_way)
        self._updater.step(part.grad, samples=self._step * self._recipe.global_batch)
        self._step += 1
        self.events["synchronisations"] += 1

        return loss

    def _set_out(self) -> list[Handle]:
        """Posts the receives and sends of this step; the parameters do not change before they are
        waited for.
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

        torch.mul(params, 1.0 - sum(weight for _, weight in neighbours), out=self._mixed)

        for arrival, (_, weight) in zip(self._arrivals, neighbours, strict=False):
            self._mixed.add_(arrival, alpha=weight)

        params.copy_(self._mixed)

    def _exchange_in_rounds(self, neighbours: list[tuple[int, float]]) -> None:
        while len(self._arrivals) < len(neighbours):
            self._arrivals.append(torch.empty_like(self._part.params))

        pairs = dict(zip((rank for rank, _ in neighbours), self._arrivals, strict=False))
        in_rounds(
            self._comm, dict.fromkeys(self._graph.listeners(self._step), self._part.params), pairs
        )

    def finish(self) -> None:
        """Nothing is under way after a step."""

    def snapshot(self) -> Tensor:
        return self._part.params

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        return {"synchronisations": [num_batches] * setting.num_workers}

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        """Upper bound: graphs that change have as many copies as pairs that met."""
        graph: Graph = setting.topology  # type: ignore[assignment]
        steps = range(2 * setting.num_workers)
        edges = {edge for step in steps for edge in graph.edges(step, setting.num_workers)}

        most = max(
            (
                sum(edge[1] == 0 for edge in graph.edges(step, setting.num_workers))
                for step in steps
            ),
            default=0,
        )

        copies = sum(0 in edge for edge in edges)
        vectors = 2 + copies if is_compressed(setting.compression) else 1 + most

        return vectors * numel(shapes) * setting.itemsize

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        traffic = Traffic()
        graph: Graph = setting.topology  # type: ignore[assignment]
        size = setting.compression.wire_bytes(pieces_of(shapes), setting.itemsize)

        for step in range(count(events, "synchronisations", 0)):
            for source, destination in graph.edges(step, setting.num_workers):
                traffic.add(source, destination, size)

        return traffic


class Copies:
    """What the other end of each edge knows: kept alike on both ends, moved by what was sent."""

    def __init__(self, strategy: Strategy, part: Part, compression: Compression) -> None:
        self._strategy = strategy
        self._part = part
        self._compression = compression
        self._pieces = pieces_of(part.shapes)
        self._start = part.params.clone()  # equal on all ranks
        self._known_of: dict[int, tuple[Tensor, Codec]] = {}  # neighbour -> its copy here
        self._known_to: dict[int, tuple[Tensor, Codec]] = {}  # listener -> our copy there
        self._difference = torch.empty_like(part.params)

    def exchange(self, step: int, rate: float) -> None:
        """One step of the graph."""
        graph = self._strategy._graph
        params = self._part.params
        outgoing = {}
        incoming = {}

        for rank in graph.listeners(step):
            copy, codec = self._edge(self._known_to, rank)
            outgoing[rank] = codec.encode(torch.sub(params, copy, out=self._difference))

        neighbours = graph.neighbours(step)

        for rank, _ in neighbours:
            _, codec = self._edge(self._known_of, rank)
            incoming[rank] = torch.empty(codec.num_bytes, dtype=torch.uint8)

        in_rounds(self._strategy._comm, outgoing, incoming)

        for rank, wire in outgoing.items():
            self._move(self._known_to[rank], wire)

        for rank, wire in incoming.items():
            self._move(self._known_of[rank], wire)

        weight = _the_weight(neighbours)

        # every edge takes from one end what it gives to the other: the sum over replicas is kept
        for rank in incoming:
            params.add_(self._known_of[rank][0], alpha=rate * weight)

        for rank in outgoing:
            params.sub_(self._known_to[rank][0], alpha=rate * weight)

    def _edge(self, edges: dict[int, tuple[Tensor, Codec]], rank: int) -> tuple[Tensor, Codec]:
        if rank not in edges:
            codec = self._compression.codec(self._pieces, self._start.dtype, feedback=False)
            edges[rank] = (self._start.clone(), codec)

        return edges[rank]

    def _move(self, edge: tuple[Tensor, Codec], wire: Tensor) -> None:
        copy, codec = edge
        codec.decode(wire, self._difference)
        copy.add_(self._difference)


def _the_weight(neighbours: list[tuple[int, float]]) -> float:
    """What a replica gives to a listener is what it takes from a neighbour: only where all weights
    are one.
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
    """Exchanges with several ranks at once, legal on every backend: distance by distance around the
    circle.
    """
    for distance in range(1, comm.size):
        to = (comm.rank + distance) % comm.size
        source = (comm.rank - distance) % comm.size
        if to in outgoing and source in incoming:
            comm.sendrecv(outgoing[to], to, incoming[source], source)
        elif to in outgoing:
            comm.send(outgoing[to], to)
        elif source in incoming:
            comm.recv(incoming[source], source)
