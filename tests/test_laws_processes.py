"""Laws of what uses torch's default process group (`ddp`, model-parallel replicas): real processes, from
one cell host."""

from __future__ import annotations

import os
from collections.abc import Iterator

import psutil
import pytest

from benchsuite.cluster.local import Cluster
from benchsuite.laws import Control, Law, MakeRanks
from benchsuite.laws.harness import cases
from benchsuite.laws.harness.process_ranks import asked_by, process_ranks, together
from benchsuite.laws.harness.runs import remembered
from benchsuite.plan.cell import Cell
from tests.law_cells import all_laws, holds, lines, on, tiny

pytestmark = [
    pytest.mark.procs,
    pytest.mark.timeout(240),
]  # the first cell of a world size runs all of that size

PLACES = {
    place: [cell for cell in place.of(cases.Asked()) if cases.in_processes(cell)]
    for place in map(cases.cells_of, all_laws())
}
RUNS = [
    run
    for family, laws in all_laws().items()
    for law in laws
    for run in asked_by(law, PLACES[cases.cells_of(family)])
]
LINES = [line for family in all_laws() for line in lines(family, PLACES[cases.cells_of(family)])]
TWINS = [
    pytest.param(law, control, id=f"{law.name}: {control.broken}")
    for laws in all_laws().values()
    for law in laws
    for control in law.controls
    if cases.in_processes(on(tiny(), **control.on))
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeRanks]:
    me = psutil.Process(os.getpid())
    before = {child.pid for child in me.children(recursive=True)}
    with Cluster() as cluster:
        yield remembered(together(process_ranks(cluster, tmp_path_factory.mktemp("ranks")), RUNS))
    left = {child.pid for child in me.children(recursive=True)} - before
    assert not left, f"processes left behind: {left}"


@pytest.mark.parametrize(("law", "cells"), LINES)
def test_what_calls_the_library(law: Law, cells: list[Cell], ranks: MakeRanks) -> None:
    holds(law, ranks, cells)


@pytest.mark.parametrize(("law", "control"), TWINS)
def test_the_law_catches(law: Law, control: Control, ranks: MakeRanks) -> None:
    figure = control.check(ranks, on(tiny(), **control.on))
    assert not figure.holds and figure.value > 1e-3, (
        f"{law.name} does not see that {control.broken}: {figure}"
    )
