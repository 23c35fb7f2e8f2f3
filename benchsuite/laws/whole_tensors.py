"""Laws of optimisers that look at whole tensors (Muon): replicas step tensors by their names.

They are shown wherever a replica holds whole tensors and steps them itself: on collectives and
graphs, and by the library. Orthogonal steps are computed in bf16 and the rest in float64, so
gradients that differ in their last bit give equal steps, but for one element in some 10^13.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchsuite import rules
from benchsuite.laws import Control, Figure, Law, MakeRanks, traffic
from benchsuite.laws.harness import twins
from benchsuite.laws.harness.cases import Asked, Cells, calls_library, subject_of, tiny
from benchsuite.laws.harness.runs import Change, rebuilt, run
from benchsuite.laws.harness.serial import LOOPS
from benchsuite.laws.harness.variants import VARIANTS, Fields
from benchsuite.laws.replicas import equals_its_loop, has_loop
from benchsuite.laws.synchronous import equals_one_process, is_exact
from benchsuite.laws.topology import compare
from benchsuite.plan.cell import Budget, Cell
from benchsuite.worker.setup import Training

RECIPE = ("muon", 0.01, 0.5)
SYNCS = ("synchronous", *LOOPS)
TOPOLOGIES = ("native", "ring", "ring_neighbours")


def steps_by_name(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """Parameters follow one process, or the serial loop of N replicas, on torch's own tensors.

    In the twins nothing is synchronised, tensors bear other names, the flat vector is stepped, or
    only the first vector of the optimiser's state is averaged.
    """
    check = equals_one_process if is_exact(cell) else equals_its_loop
    return check(make_ranks, cell, change=change)


def sends_its_state(make_ranks: MakeRanks, cell: Cell, *, change: Change | None = None) -> Figure:
    """Bytes and messages, those of momentum vectors included, are the predicted ones.

    What the library sends is derived from its calls. Bound: exact. The twin sends only the first
    vector of the state.
    """
    result = run(make_ranks, cell, change=change)
    return compare(result.traffic + result.called, traffic.predicted(result), result.cell)


def _cells(asked: Asked) -> list[Cell]:
    """Every form of every strategy, on one library collective, one of messages and one graph."""
    made: list[Cell] = []
    if not asked.includes(compression="none"):
        return made
    for sync in (name for name in asked.members("sync") if name in SYNCS):
        for topology in (name for name in asked.members("topology") if name in TOPOLOGIES):
            for own in (given for given in VARIANTS.get(sync, ({},)) if "outer_bits" not in given):
                options: Fields = {sync: own} if own else {}
                budget = Budget(timeout_s=60.0) if calls_library(sync) else Budget()
                fields: Fields = {
                    "sync": sync,
                    "topology": topology,
                    "options": options,
                    "clock": asked.clock,
                }
                made += [
                    tiny(RECIPE, replicas=n, budget=budget, **fields)
                    for n in asked.workers
                    if n in (2, 3)
                ]
    return [cell for cell in made if not rules.validate(cell)]


def _renamed(training: Training) -> Training:
    """The change in which each tensor bears the name of the one before it.

    Biases and matrices change places.
    """
    make = training.recipe.make_optimizer

    def moved(named: Iterable[tuple[str, Tensor]]) -> torch.optim.Optimizer:
        names, tensors = zip(*named, strict=True)
        return make(zip([*names[-2:], *names[:-2]], tensors, strict=True))

    return rebuilt(training, recipe=dataclasses.replace(training.recipe, make_optimizer=moved))


def _flat(training: Training) -> Training:
    """The change that steps the vector as one tensor, as an elementwise optimiser would.

    Nothing in it is a matrix.
    """
    make = training.recipe.make_optimizer
    recipe = dataclasses.replace(
        training.recipe,
        elementwise=True,
        make_optimizer=lambda tensors: make(("", each) for each in tensors),
    )
    return rebuilt(training, recipe=recipe)


def _averages_one(training: Training) -> Training:
    """The change in which only the first of the optimiser's vectors is averaged."""
    updater: Any = training.strategy._updater  # type: ignore[attr-defined]
    whole = updater.state
    updater.state = lambda: whole()[:1]
    return training


def _on(sync: str, **own: Any) -> Mapping[str, Any]:
    """Fields of a cell of this strategy that trains with Muon."""
    options: Fields = {"tiny": {"optimizer": "muon", "lr": 0.01}, **({sync: own} if own else {})}
    return {"sync": sync, "topology": "ring", "replicas": 3, "options": options}


_SYNCHRONOUS = _on("synchronous")
_LOCAL = _on("local_sgd", local_steps=5, momentum="averaged")
CELLS = Cells(_cells, subject_of)
_LAWS = (
    Law(
        "an optimiser of whole tensors steps them by their names",
        steps_by_name,
        lambda cell: is_exact(cell) or has_loop(cell),
        (
            Control(
                "nothing is synchronised",
                partial(steps_by_name, change=twins.with_mean(twins.silent)),
                _SYNCHRONOUS,
            ),
            Control(
                "tensors are called by other names",
                partial(steps_by_name, change=_renamed),
                _SYNCHRONOUS,
            ),
            Control(
                "the flat vector is stepped", partial(steps_by_name, change=_flat), _SYNCHRONOUS
            ),
            Control(
                "only the first vector of its state is averaged",
                partial(steps_by_name, change=_averages_one),
                _LOCAL,
            ),
        ),
    ),
    Law(
        "momentum of whole tensors sends the bytes of its vectors",
        sends_its_state,
        lambda cell: not calls_library(cell.sync),
        (
            Control(
                "only the first vector of its state is sent",
                partial(sends_its_state, change=_averages_one),
                _LOCAL,
            ),
        ),
    ),
)
LAWS = _LAWS if hasattr(torch.optim, "Muon") else ()  # torch has it from 2.9 on
