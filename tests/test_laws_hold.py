"""The laws on the whole grid of what is built: every allowed strategy, topology and compression, 1 to
4 workers. Float64."""

from __future__ import annotations

from functools import cache

import pytest

from benchsuite.laws import Law
from benchsuite.laws.harness import cases
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.laws.harness.runs import remembered
from benchsuite.plan.cell import Cell
from tests.law_cells import RECIPES, all_laws, holds, lines, shapes, strict_ranks, tiny

RANKS = remembered(thread_ranks)  # laws that look at the same run share it
STRICT = remembered(strict_ranks)

SHAPES = list(shapes())
# Each optimiser also with what it lacks in the grid: clipped where it was not, unclipped where it
# was (at lr 0.05 nesterov would diverge in one process too, and amplify roundings from 1e-16 to
# 1e-4).
OTHERWISE = [
    tiny((optimizer, 0.01, 0.0 if clip_norm else 0.5), replicas=n, **shape)
    for optimizer, _, clip_norm in RECIPES[2:]
    for shape in ({"topology": "ring"}, {"topology": "parameter_server", "servers": 2})
    for n in (1, 3)
]
FLOAT32 = [
    tiny(**shape, precision="fp32")
    for shape in SHAPES
    if shape["sync"] == "synchronous" and shape["replicas"] == 3
]


@cache
def cells_of(place: cases.Cells) -> list[Cell]:
    """Those whose ranks may be threads (the others: tests/test_laws_processes.py)."""
    return [cell for cell in place.of(cases.Asked()) if not cases.in_processes(cell)]


@pytest.mark.parametrize(
    ("law", "cells"),
    [case for family in all_laws() for case in lines(family, cells_of(cases.cells_of(family)))],
)
def test_on_threads(law: Law, cells: list[Cell]) -> None:
    holds(law, RANKS, cells)


@pytest.mark.parametrize(
    ("law", "cells"),
    [case for family in ("synchronous", "traffic") for case in lines(family, OTHERWISE)],
)
def test_with_and_without_clipping(law: Law, cells: list[Cell]) -> None:
    holds(law, RANKS, cells)


@pytest.mark.parametrize(("law", "cells"), [*lines("synchronous", FLOAT32)])
def test_float32(law: Law, cells: list[Cell]) -> None:
    holds(law, RANKS, cells)


@pytest.mark.parametrize(
    ("law", "cells"),
    [
        case
        for family in ("synchronous", "server_log", "traffic")
        for case in lines(
            family,
            [
                tiny(RECIPES[1], **shape)
                for shape in SHAPES
                if shape["replicas"] == 3 and "none" not in str(shape)
            ],
            only=lambda law: not law.own_run,
        )
    ],
)
def test_with_nothing_that_nccl_refuses(law: Law, cells: list[Cell]) -> None:
    holds(law, STRICT, cells)


@pytest.mark.parametrize(("law", "cells"), [*lines("topology", cases.means(cases.Asked()))])
def test_one_mean_with_nothing_that_nccl_refuses(law: Law, cells: list[Cell]) -> None:
    holds(law, strict_ranks, cells)
