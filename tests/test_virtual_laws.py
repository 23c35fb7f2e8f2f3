"""The same laws in virtual time: the strategies' own files on greenlets, replicas whose gradients
are computed together."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from benchsuite.laws import Law
from benchsuite.laws.harness import cases
from benchsuite.laws.harness.runs import relative, remembered, run
from benchsuite.laws.harness.virtual_ranks import virtual_ranks
from benchsuite.plan.cell import Cell
from benchsuite.virtual.gradients import Graphs
from tests.law_cells import RECIPES, STALE_RECIPES, all_laws, holds, lines, recipes, shapes, tiny

GRAPHS: dict[str, Graphs] = {}  # the tiny workload is traced once per recipe
RANKS = remembered(partial(virtual_ranks, graphs=GRAPHS))
SLOW_LINK = remembered(partial(virtual_ranks, graphs=GRAPHS, link_mbit=0.1, latency_us=50_000.0))
VIRTUAL = cases.Asked(clock="virtual")


def steady(shape: dict[str, Any]) -> tuple[str, float, float]:
    """SGD with momentum at a rate that does not amplify roundings."""
    return STALE_RECIPES[2] if recipes(shape)[0] in STALE_RECIPES else RECIPES[2]


GRID = [tiny(recipe, **shape) for shape in shapes(VIRTUAL) for recipe in recipes(shape)[-2:]]
FOUR = list(shapes(replace(VIRTUAL, workers=(4,))))
LARGE = [
    tiny(steady(shape), **shape)
    for shape in shapes(replace(VIRTUAL, workers=(6, 8, 12)))
    if shape["servers"] <= 1 and "compression" not in shape
]


def can_break(law: Law) -> bool:
    """Whether ranks of virtual time can."""
    return not all(control.real_ranks for control in law.controls)


def lines_of(cells: list[Cell]) -> list[Any]:
    """Laws of strategies."""
    return [
        line
        for family in all_laws()
        if cases.cells_of(family) is cases.TRAINING
        for line in lines(family, cells, only=can_break)
    ]


@pytest.mark.parametrize(("law", "cells"), lines_of([*GRID, *LARGE]))
def test_in_virtual_time(law: Law, cells: list[Cell]) -> None:
    holds(law, RANKS, cells)


@pytest.mark.parametrize(
    ("law", "cells"),
    lines_of([cell for cell in GRID if cell.replicas == 3 and cell.options["tiny"]["clip_norm"]]),
)
def test_on_links_slower_than_the_gradients(law: Law, cells: list[Cell]) -> None:
    """0.1 Mbit/s and 50 ms: answers cross with pushes, goodbyes with answers."""
    holds(law, SLOW_LINK, cells)


@pytest.mark.parametrize(
    ("law", "cells"),
    [
        *(
            line
            for family in ("topology", "graphs")
            for line in lines(family, cases.means(replace(VIRTUAL, workers=(1, 2, 3, 4, 7))))
        ),
        *lines("comm", [tiny(replicas=n) for n in (2, 3, 4)]),
    ],
)
@pytest.mark.parametrize("strict", ["", "nccl"], ids=["posts ahead", "in rounds"])
def test_what_strategies_lean_on(law: Law, cells: list[Cell], strict: str) -> None:
    def ranks(size: int, body: Any, **_: Any) -> list[Any]:
        return virtual_ranks(size, body, strict=strict)

    holds(law, ranks, cells)


# A lossy compression is not continuous: which elements it sends, a rounding may decide.
@pytest.mark.parametrize(
    "shape",
    [shape for shape in FOUR if "compression" not in shape],
    ids=lambda shape: "-".join(map(str, shape.values())),
)
def test_gradients_computed_together_are_those_computed_one_by_one(shape: dict[str, Any]) -> None:
    cell = tiny(steady(shape), **shape)
    together = run(RANKS, cell)
    alone = run(partial(virtual_ranks, batching=False), cell)
    for mine, theirs in zip(together.ranks, alone.ranks, strict=True):
        gap = relative(mine.params[-1] - theirs.params[-1], theirs.params[-1])
        assert gap <= 1e-10, f"rank {mine.rank}: {gap:.3g} is not <= 1e-10"


def test_the_start_order_of_the_ranks_changes_no_bit() -> None:
    for shape in FOUR:
        cell = tiny(RECIPES[2], **shape)
        first = run(RANKS, cell)
        other = run(
            partial(virtual_ranks, graphs=GRAPHS, start_order=range(cell.world_size)[::-1]), cell
        )
        for mine, theirs in zip(first.ranks, other.ranks, strict=True):
            assert (
                mine.losses == theirs.losses and mine.work == theirs.work and mine.log == theirs.log
            ), shape
            assert all(
                torch.equal(a, b) for a, b in zip(mine.params, theirs.params, strict=True)
            ), shape
