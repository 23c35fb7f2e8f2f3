"""Laws of gossip graphs: W mixes and loses nothing.

W is put together from what every rank says of itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchsuite.comm import Comm
from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.harness import cases
from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell, resolve
from benchsuite.topology import Graph
from benchsuite.worker import setup

STEPS = 20
ROUNDING = 1e-12
Wrap = Callable[[Graph], Any]
# Neighbours, listeners and edges of a step.
Told = tuple[list[tuple[int, float]], list[int], list[tuple[int, int]]]


def whole(graph: Graph) -> Any:
    """The graph as it is."""
    return graph


def told(make_ranks: MakeRanks, cell: Cell, wrap: Wrap) -> list[list[Told]]:
    """[rank][step]: what each rank says of itself, and what a graph not started says of all."""

    def graph() -> Any:
        return wrap(setup.make("topology", cell.topology, setup.options_for(cell, "topology")))

    def body(comm: Comm) -> list[Told]:
        started = graph()
        started.start(comm)
        return [
            (started.neighbours(step), started.listeners(step), graph().edges(step, comm.size))
            for step in range(STEPS)
        ]

    return make_ranks(cell.replicas, body)


def matrices(per_rank: list[list[Told]]) -> list[Tensor]:
    """W of every step, where W_ij is the weight of what rank i gets from rank j."""
    size = len(per_rank)
    found = [torch.zeros(size, size, dtype=torch.float64) for _ in range(STEPS)]
    for rank, steps in enumerate(per_rank):
        for w, (neighbours, _, _) in zip(found, steps, strict=True):
            for other, weight in neighbours:
                w[rank, other] += weight
            w[rank, rank] += 1 - sum(weight for _, weight in neighbours)
    return found


def is_doubly_stochastic(make_ranks: MakeRanks, cell: Cell, *, wrap: Wrap = whole) -> Figure:
    """In each of 20 steps no weight of W is below 0, and every column sums to 1.

    Rows sum to 1 by definition. Bound: 1e-12. In the twins all listen to rank 0, or weights are too
    heavy.
    """
    cell = resolve(cell)
    worst = 0.0
    where = ""
    for step, w in enumerate(matrices(told(make_ranks, cell, wrap))):
        gap = max(float((w.sum(dim=0) - 1).abs().max()), float(-w.min()))
        if gap > worst:
            worst = gap
            where = (
                f"step {step}: columns sum to {w.sum(dim=0).tolist()}, smallest weight "
                f"{float(w.min())}"
            )
    return Figure(worst, ROUNDING, f"{where or 'all columns sum to 1'}, {cell.label}")


def says_one_thing(make_ranks: MakeRanks, cell: Cell, *, wrap: Wrap = whole) -> Figure:
    """Whom a rank hears, whom it sends to and the edges of a prediction agree.

    Each edge is there once, in the order of ranks. Bound: exact. The twins send to the next step's
    listeners, or listen to others.
    """
    cell = resolve(cell)
    per_rank = told(make_ranks, cell, wrap)
    wrong = 0
    where = ""
    for step in range(STEPS):
        heard = [
            (other, rank) for rank, steps in enumerate(per_rank) for other, _ in steps[step][0]
        ]
        spoken = [(rank, other) for rank, steps in enumerate(per_rank) for other in steps[step][1]]
        for rank, steps in enumerate(per_rank):
            neighbours, listeners, edges = steps[step]
            ranks = [other for other, _ in neighbours]
            differ = (
                len(set(heard) ^ set(edges))
                + len(set(spoken) ^ set(edges))
                + len(edges)
                - len(set(edges))
            )
            differ += (ranks != sorted(set(ranks) - {rank})) + (
                listeners != sorted(set(listeners) - {rank})
            )
            if differ and not where:
                where = f"step {step}: {heard} are heard, {spoken} spoken to, {edges} predicted; "
            wrong += differ
    return Figure(wrong, 0, f"{where}{wrong} edges differ, {cell.label}")


def mixes(make_ranks: MakeRanks, cell: Cell, *, wrap: Wrap = whole) -> Figure:
    """Twenty steps shrink every disagreement.

    The second largest modulus of the eigenvalues of their product is below 1, with 1 - 1e-6 as the
    bound. In the twin the pairs never change.
    """
    cell = resolve(cell)
    product = _product(matrices(told(make_ranks, cell, wrap)))
    modulus = float(torch.linalg.eigvals(product - 1 / cell.replicas).abs().max())
    return Figure(modulus, 1 - 1e-6, f"second largest modulus after {STEPS} steps, {cell.label}")


def agrees_after_q(make_ranks: MakeRanks, cell: Cell, *, wrap: Wrap = whole) -> Figure:
    """On the exponential graph with N = 2^q, any q steps in a row average exactly.

    Their product is 1/N everywhere. Bound: 1e-12. In the twin the distance does not double.
    """
    cell = resolve(cell)
    rounds = cell.replicas.bit_length() - 1
    found = matrices(told(make_ranks, cell, wrap))
    gaps = [
        float((_product(found[first : first + rounds]) - 1 / cell.replicas).abs().max())
        for first in range(STEPS - rounds)
    ]
    return Figure(
        max(gaps), ROUNDING, f"farthest from 1/{cell.replicas} after {rounds} steps, {cell.label}"
    )


def _product(matrices: list[Tensor]) -> Tensor:
    """The product of the matrices, the last step's on the left."""
    product = torch.eye(len(matrices[0]), dtype=torch.float64)
    for w in matrices:
        product = w @ product
    return product


# -- broken graphs ---------------------------------------------------------------------------------


class _Twin:
    """A graph with one of its answers replaced: it becomes `instead(graph, rank, step)`."""

    def __init__(self, graph: Graph, name: str, instead: Callable[[Graph, int, int], Any]) -> None:
        self._graph = graph
        self._name = name
        self._instead = instead

    def start(self, comm: Comm) -> None:
        self._graph.start(comm)
        self._rank = comm.rank

    def neighbours(self, step: int) -> list[tuple[int, float]]:
        return self._answer("neighbours", step)  # type: ignore[no-any-return]

    def listeners(self, step: int) -> list[int]:
        return self._answer("listeners", step)  # type: ignore[no-any-return]

    def edges(self, step: int, num_workers: int) -> list[tuple[int, int]]:
        return self._graph.edges(step, num_workers)

    def _answer(self, name: str, step: int) -> Any:
        if name == self._name:
            return self._instead(self._graph, self._rank, step)
        return getattr(self._graph, name)(step)


def _with(name: str, instead: Callable[[Graph, int, int], Any]) -> Wrap:
    """The wrapper that replaces one answer of a graph."""
    return lambda graph: _Twin(graph, name, instead)


def _star(graph: Graph, rank: int, step: int) -> list[tuple[int, float]]:
    """Everybody listens to rank 0."""
    return [(0, 0.5)] if rank else []


def _too_heavy(graph: Graph, rank: int, step: int) -> list[tuple[int, float]]:
    """Weights that are symmetric, but leave less than 0 for the rank itself."""
    return [(other, 0.75) for other, _ in graph.neighbours(step)]


def _in_halves(graph: Graph, rank: int, step: int) -> list[tuple[int, float]]:
    """Pairs that never change."""
    return [(rank ^ 1, 0.5)]


def _next_step(graph: Graph, rank: int, step: int) -> list[int]:
    """The listeners of the next step."""
    return graph.listeners(step + 1)


def _always_the_next(graph: Graph, rank: int, step: int) -> list[tuple[int, float]]:
    """Only the next rank is heard, in every step."""
    return [((rank + 1) % graph.num_workers, 0.5)]


def is_graph(cell: Cell) -> bool:
    """Whether the topology is a gossip graph of several workers.

    A random matching needs an even number of them.
    """
    odd = cell.topology == "random_matching" and cell.replicas % 2
    return (
        cell.replicas > 1
        and not odd
        and hasattr(plugins.load("topology", cell.topology), "neighbours")
    )


_RING = {"topology": "ring_neighbours", "replicas": 4}
_EXPONENTIAL = {"topology": "exponential", "replicas": 4}

CELLS = cases.MEANS
LAWS = (
    Law(
        "W is doubly stochastic",
        is_doubly_stochastic,
        is_graph,
        (
            Control(
                "all listen to rank 0",
                partial(is_doubly_stochastic, wrap=_with("neighbours", _star)),
                _RING,
            ),
            Control(
                "weights too heavy",
                partial(is_doubly_stochastic, wrap=_with("neighbours", _too_heavy)),
                _RING,
            ),
        ),
    ),
    Law(
        "who is heard, who is spoken to and what is predicted are the same edges",
        says_one_thing,
        is_graph,
        (
            Control(
                "sends to the next step's listeners",
                partial(says_one_thing, wrap=_with("listeners", _next_step)),
                _EXPONENTIAL,
            ),
            Control(
                "listens to others", partial(says_one_thing, wrap=_with("neighbours", _star)), _RING
            ),
        ),
    ),
    Law(
        "mixing shrinks every disagreement",
        mixes,
        is_graph,
        (
            Control(
                "the same pairs for ever",
                partial(mixes, wrap=_with("neighbours", _in_halves)),
                _RING,
            ),
        ),
    ),
    Law(
        "2^q workers agree after q steps of the exponential graph",
        agrees_after_q,
        lambda cell: (
            is_graph(cell) and cell.topology == "exponential" and cell.replicas.bit_count() == 1
        ),
        (
            Control(
                "the distance does not double",
                partial(agrees_after_q, wrap=_with("neighbours", _always_the_next)),
                _EXPONENTIAL,
            ),
        ),
    ),
)
