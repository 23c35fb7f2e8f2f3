"""Laws of strategies that use torch's default process group: real processes, from one cell host."""

from __future__ import annotations

import os
from collections.abc import Iterator

import psutil
import pytest

from benchsuite.cell import Cell
from benchsuite.cluster.local import Cluster
from benchsuite.laws import Control, Law, MakeRanks, grid
from benchsuite.laws.process_ranks import process_ranks
from benchsuite.laws.runs import remembered
from tests.law_cells import all_laws, holds, lines, on, tiny

pytestmark = [pytest.mark.procs, pytest.mark.timeout(90)]

GRID = [cell for cell in grid.training(grid.Asked()) if grid.calls_library(cell.sync)]
MICRO = [cell for cell in grid.cells_of("micro_batches").of(grid.Asked()) if grid.calls_library(cell.sync)]
TWINS = [
    pytest.param(law, control, id=f"{law.name}: {control.broken}")
    for laws in all_laws().values()
    for law in laws
    for control in law.controls
    if grid.calls_library(control.on.get("sync", "synchronous"))
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeRanks]:
    me = psutil.Process(os.getpid())
    before = {child.pid for child in me.children(recursive=True)}
    with Cluster() as cluster:
        yield remembered(process_ranks(cluster, tmp_path_factory.mktemp("ranks")))
    left = {child.pid for child in me.children(recursive=True)} - before
    assert not left, f"processes left behind: {left}"


@pytest.mark.parametrize(("law", "cells"), [line for family in all_laws() if grid.cells_of(family) is grid.TRAINING for line in lines(family, GRID)])
def test_strategies_of_the_library(law: Law, cells: list[Cell], ranks: MakeRanks) -> None:
    holds(law, ranks, cells)


@pytest.mark.parametrize(("law", "cells"), [*lines("micro_batches", MICRO)])
def test_micro_batches_in_the_library(law: Law, cells: list[Cell], ranks: MakeRanks) -> None:
    holds(law, ranks, cells)


@pytest.mark.parametrize(("law", "control"), TWINS)
def test_the_law_catches(law: Law, control: Control, ranks: MakeRanks) -> None:
    figure = control.check(ranks, on(tiny(), **control.on))
    assert not figure.holds and figure.value > 1e-3, f"{law.name} does not see that {control.broken}: {figure}"
