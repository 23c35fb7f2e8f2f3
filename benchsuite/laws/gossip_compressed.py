"""Laws of compressed gossip (CHOCO): copies of neighbours, moved by what travelled, move a replica.

Koloskova et al. 2019, arXiv 1902.00340, written down once more as a serial loop: there is a copy
per edge, moved by Q(x - copy), and x_i += consensus_rate sum over j of W_ij (copy of j - copy of
i). Where Q loses nothing the copies are the replicas themselves, so a second loop without copies
mixes by (1 - consensus_rate) I + consensus_rate W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchsuite.compression import Codec, Compression, pieces_of
from benchsuite.laws import Control, Figure, Law, MakeRanks
from benchsuite.laws.gossip import is_gossip
from benchsuite.laws.harness.runs import Change, relative, run, with_options, worst
from benchsuite.laws.harness.serial import Exchange, gossiping, mix
from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell, resolve
from benchsuite.worker import setup
from benchsuite.worker.setup import Training
from benchsuite.workload import Shapes

FLOAT64 = 1e-10
RATE = 0.5  # at 1 a strategy that ignores the rate would go unseen


def follows_choco(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """Every worker's parameters after every step are those of the serial loop with copies.

    Bound: a relative error of 1e-10. In the twins replicas never mix, the consensus rate is
    missing, or copies are forgotten.
    """
    cell = resolve(with_options(cell, "gossip", consensus_rate=RATE))
    return _compared(make_ranks, cell, change, lambda start, shapes: Choco(cell, start, shapes))


def lossless_is_mixing(
    make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None
) -> Figure:
    """Over top-k with k = P parameters are those of mixing by (1 - rate) I + rate W.

    Bound: a relative error of 1e-10. In the twins replicas never mix, or the consensus rate is
    missing.
    """
    cell = with_options(with_options(cell, "gossip", consensus_rate=RATE), "topk", rho=1.0)
    return _compared(make_ranks, resolve(cell), change, lambda start, shapes: towards_mixing)


def _compared(
    make_ranks: MakeRanks,
    cell: Cell,
    change: Change | None,
    made: Callable[[Tensor, Shapes], Exchange],
) -> Figure:
    """The largest relative error of any worker after any step.

    The reference is a serial loop with the exchange that `made` makes.
    """
    result = run(make_ranks, cell, change=change)
    path = gossiping(cell, made(result.workers[0].params[0], result.workers[0].shapes))
    value, where = worst(
        [
            (
                relative(mine - at[worker.rank], at[worker.rank]),
                f"worker {worker.rank} after step {step}",
            )
            for worker in result.workers
            for step, (mine, at) in enumerate(zip(worker.params, path, strict=True))
        ]
    )
    text = (
        f"||difference|| / ||parameters||, largest of {len(path) - 1} steps: {where}, {cell.label}"
    )
    return Figure(value, FLOAT64, text)


def towards_mixing(params: list[Tensor], weights: Tensor) -> None:
    """Mixes by (1 - rate) I + rate W."""
    mix(params, (1 - RATE) * torch.eye(len(params), dtype=weights.dtype) + RATE * weights)


class Choco:
    """The copies of all edges, and the codecs that move them."""

    def __init__(self, cell: Cell, start: Tensor, shapes: Shapes) -> None:
        options = setup.options_for(cell, "compression")
        self._compression: Compression = setup.make("compression", cell.compression, options)
        self._compression.start(shapes, seed=cell.seed)
        self._pieces = pieces_of(shapes)
        self._start = start
        self._edges: dict[tuple[int, int], tuple[Tensor, Codec]] = {}

    def __call__(self, params: list[Tensor], weights: Tensor) -> None:
        size = len(params)
        edges = [
            (j, i) for i in range(size) for j in range(size) if i != j and float(weights[i, j]) != 0
        ]
        copies = {(source, to): self._moved(source, to, params[source]) for source, to in edges}
        for (source, to), copy in copies.items():
            params[to].add_(copy, alpha=RATE * float(weights[to, source]))
            params[source].sub_(copy, alpha=RATE * float(weights[to, source]))

    def _moved(self, source: int, to: int, own: Tensor) -> Tensor:
        """The edge's copy, after Q(x - copy) has travelled."""
        if (source, to) not in self._edges:
            codec = self._compression.codec(self._pieces, own.dtype, feedback=False)
            self._edges[source, to] = self._start.clone(), codec
        copy, codec = self._edges[source, to]
        difference = own - copy
        codec.decode(codec.encode(difference), difference)
        return copy.add_(difference)


# -- broken twins ----------------------------------------------------------------------------------


def _at_rate(given: Callable[[float], float]) -> Change:
    """The change that gives replicas another consensus rate than the option's."""

    def change(training: Training) -> Training:
        strategy: Any = training.strategy
        exchange = strategy._copies.exchange
        strategy._copies.exchange = lambda step, rate: exchange(step, given(rate))
        return training

    return change


def _forgets(training: Training) -> Training:
    """The change in which copies stay where they started."""
    strategy: Any = training.strategy
    copies = strategy._copies
    move = strategy._copies._move

    def moved(edge: tuple[Tensor, Codec], wire: Tensor) -> None:
        edge[0].copy_(copies._start)
        move(edge, wire)

    copies._move = moved
    return training


_ON: Mapping[str, Any] = {
    "sync": "gossip",
    "topology": "ring_neighbours",
    "replicas": 4,
    "compression": "topk",
}
_INT8 = {**_ON, "compression": "int8"}

LAWS = (
    Law(
        "compressed gossip moves replicas by the copies that travelled",
        follows_choco,
        lambda cell: is_gossip(cell) and cell.compression != "none",
        (
            Control(
                "replicas never mix",
                partial(follows_choco, change=_at_rate(lambda rate: 0.0)),
                _INT8,
            ),
            Control(
                "the consensus rate is missing",
                partial(follows_choco, change=_at_rate(lambda rate: 1.0)),
                _INT8,
            ),
            Control("copies are forgotten", partial(follows_choco, change=_forgets), _INT8),
        ),
        own_run=True,
    ),
    Law(
        "gossip over a compression that loses nothing mixes by (1 - rate) I + rate W",
        lossless_is_mixing,
        lambda cell: is_gossip(cell) and plugins.stem(cell.compression) == "topk",
        (
            Control(
                "replicas never mix",
                partial(lossless_is_mixing, change=_at_rate(lambda rate: 0.0)),
                _ON,
            ),
            Control(
                "the consensus rate is missing",
                partial(lossless_is_mixing, change=_at_rate(lambda rate: 1.0)),
                _ON,
            ),
        ),
        own_run=True,
    ),
)
