"""The same laws in virtual time: the strategies' own files on greenlets, replicas whose gradients are computed together."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from benchsuite import rules
from benchsuite.cell import Cell
from benchsuite.laws import Law
from benchsuite.laws.grid import means
from benchsuite.laws.runs import relative, remembered, run
from benchsuite.laws.virtual_ranks import virtual_ranks
from benchsuite.virtual.gradients import Graphs
from tests.law_cells import RECIPES, STALE_RECIPES, cases, recipes, shapes, tiny

GRAPHS: dict[str, Graphs] = {}  # the tiny workload is traced once per recipe
RANKS = remembered(partial(virtual_ranks, graphs=GRAPHS))
SLOW_LINK = remembered(partial(virtual_ranks, graphs=GRAPHS, link_mbit=0.1, latency_us=50_000.0))
FAMILIES = ("synchronous", "parameter_server", "server_log", "replay", "asynchronous", "k_sync", "traffic")
BY_DISPATCH = "the library's collectives are seen with their sizes"  # there is no library: `calls` of the comm instead

CANCEL = [
    {"sync": "k_sync", "topology": "parameter_server", "servers": 1, "replicas": n,
     "options": {"k_sync": {"backup_workers": c, "late": "cancel", "batch": batch}}}
    for n in (2, 3, 4, 8) for c in (0, 1) for batch in (False, True)
]  # fmt: skip


def legal(shape: dict[str, Any]) -> bool:
    return not rules.validate(tiny(**shape, clock="virtual"))


def momentum(shape: dict[str, Any]) -> tuple[str, float, float]:
    """SGD with momentum at a rate that does not amplify roundings."""
    return RECIPES[2] if shape["sync"] == "synchronous" else STALE_RECIPES[2]


SHAPES = [shape for shape in shapes() if legal(shape)]
GRID = [tiny(recipe, **shape, clock="virtual") for shape in SHAPES for recipe in recipes(shape)[-2:]]
LARGE = [
    tiny(momentum(shape), **{**shape, "replicas": n}, clock="virtual")
    for shape in SHAPES
    for n in (6, 12)
    if shape["replicas"] == 2 and shape["servers"] <= 1 and legal({**shape, "replicas": n})
]
CANCELLED = [tiny(recipe, **shape, clock="virtual") for shape in CANCEL for recipe in RECIPES[1:3]]


def cases_of(grid: list[Cell]) -> list[Any]:
    return [case for family in FAMILIES for case in cases(family, grid, only=lambda law: law.name != BY_DISPATCH)]


def test_the_grid_is_not_empty() -> None:
    assert {cell.sync for cell in GRID} >= {"synchronous", "asynchronous", "k_sync"}
    assert {cell.topology for cell in GRID} >= {"ring", "native", "parameter_server"}


@pytest.mark.parametrize(("law", "cell"), cases_of([*GRID, *LARGE, *CANCELLED]))
def test_in_virtual_time(law: Law, cell: Cell) -> None:
    figure = law.check(RANKS, cell)
    assert figure.holds, f"{law.name}: {figure}"


@pytest.mark.parametrize(
    ("law", "cell"),
    cases_of([cell for cell in [*GRID, *CANCELLED] if cell.replicas == 3 and cell.options["tiny"]["clip_norm"]]),
)
def test_on_links_slower_than_the_gradients(law: Law, cell: Cell) -> None:
    """0.1 Mbit/s and 50 ms: answers cross with pushes, goodbyes with answers."""
    figure = law.check(SLOW_LINK, cell)
    assert figure.holds, f"{law.name}: {figure}"


@pytest.mark.parametrize(
    ("law", "cell"),
    [
        *cases("topology", means((1, 2, 3, 4, 7))),
        *cases("comm", [tiny(replicas=n) for n in (2, 3, 4)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("strict", ["", "nccl"], ids=["posts ahead", "in rounds"])
def test_what_strategies_lean_on(law: Law, cell: Cell, strict: str) -> None:
    def ranks(size: int, body: Any, **_: Any) -> list[Any]:
        return virtual_ranks(size, body, strict=strict)

    figure = law.check(ranks, cell)
    assert figure.holds, f"{law.name}: {figure}"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_gradients_computed_together_are_those_computed_one_by_one(shape: dict[str, Any]) -> None:
    cell = tiny(momentum(shape), **shape, clock="virtual")
    together = run(RANKS, cell)
    alone = run(partial(virtual_ranks, batching=False), cell)
    for mine, theirs in zip(together.ranks, alone.ranks, strict=True):
        gap = relative(mine.params[-1] - theirs.params[-1], theirs.params[-1])
        assert gap <= 1e-10, f"rank {mine.rank}: {gap:.3g} is not <= 1e-10"


def test_the_start_order_of_the_ranks_changes_no_bit() -> None:
    for shape in SHAPES:
        cell = tiny(RECIPES[2], **shape, clock="virtual")
        first = run(RANKS, cell)
        other = run(partial(virtual_ranks, graphs=GRAPHS, start_order=range(cell.world_size)[::-1]), cell)
        for mine, theirs in zip(first.ranks, other.ranks, strict=True):
            assert mine.losses == theirs.losses and mine.work == theirs.work and mine.log == theirs.log, shape
            assert all(torch.equal(a, b) for a, b in zip(mine.params, theirs.params, strict=True)), shape
