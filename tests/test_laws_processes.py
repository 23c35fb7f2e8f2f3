"""Laws of strategies that use torch's default process group: real processes, from one cell host."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from benchsuite.cell import Budget, Cell
from benchsuite.cluster.local import Cluster
from benchsuite.laws import Law
from benchsuite.laws.process_ranks import process_ranks
from benchsuite.laws.runs import remembered
from benchsuite.laws.synchronous import equals_one_process, replicas_agree
from benchsuite.laws.twins import without_wrapper
from tests.law_cells import RECIPES, all_laws, cases, tiny

pytestmark = [pytest.mark.procs, pytest.mark.timeout(60)]

FAST = Budget(timeout_s=30.0)
GRID = [tiny(recipe, sync="ddp", replicas=n, budget=FAST) for n in (1, 2, 4) for recipe in (RECIPES[0], RECIPES[1], RECIPES[5])]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    me = psutil.Process(os.getpid())
    before = {child.pid for child in me.children(recursive=True)}
    with Cluster() as cluster:
        yield remembered(process_ranks(cluster, tmp_path_factory.mktemp("ranks")))
    left = {child.pid for child in me.children(recursive=True)} - before
    assert not left, f"processes left behind: {left}"


@pytest.mark.parametrize(("law", "cell"), [case for family in all_laws() for case in cases(family, GRID)
                                           if family in ("synchronous", "traffic")])  # fmt: skip
def test_ddp(law: Law, cell: Cell, ranks: Callable[..., list[Any]]) -> None:
    figure = law.check(ranks, cell)
    assert figure.holds, f"{law.name}: {figure}"


@pytest.mark.parametrize("law", [equals_one_process, replicas_agree])
def test_the_law_sees_that_ddp_is_missing(law: Callable[..., Any], ranks: Callable[..., list[Any]]) -> None:
    figure = law(ranks, tiny(sync="ddp", replicas=2, budget=FAST), change=without_wrapper)
    assert not figure.holds and figure.value > 1e-3, figure
