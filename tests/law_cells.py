"""The grid of laws (`benchsuite/laws/harness/cases.py`) for pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from benchsuite.laws import Law, MakeRanks, families
from benchsuite.laws.harness import cases as law_cases
from benchsuite.laws.harness.cases import TINY, label, on, recipes, shapes, tiny
from benchsuite.laws.harness.ranks import thread_ranks
from benchsuite.laws.harness.variants import RECIPES, STALE_RECIPES
from benchsuite.plan.cell import Cell

__all__ = [
    "RECIPES",
    "STALE_RECIPES",
    "TINY",
    "all_laws",
    "cases",
    "holds",
    "label",
    "lines",
    "on",
    "recipes",
    "shapes",
    "strict_ranks",
    "tiny",
]

torch.set_num_threads(1)


@cache
def all_laws() -> dict[str, tuple[Law, ...]]:
    return families()


def cases(
    family: str, cells: list[Cell], *, only: Callable[[Law], bool] = lambda law: True
) -> Iterator[Any]:
    """(law, cell) of a family."""
    for law, cell in law_cases.cases(all_laws()[family], cells, only=only):
        yield pytest.param(law, cell, id=f"{law.name}: {label(cell)}")


def lines(
    family: str, cells: list[Cell], *, only: Callable[[Law], bool] = lambda law: True
) -> Iterator[Any]:
    """(law, cells of one strategy) of a family."""
    subject = law_cases.cells_of(family).subject
    for law in filter(only, all_laws()[family]):
        found: dict[str, list[Cell]] = {}
        for _, cell in law_cases.cases([law], cells):
            found.setdefault(subject(cell), []).append(cell)
        for name, shown in found.items():
            yield pytest.param(law, shown, id=f"{law.name}: {name}")


def holds(law: Law, ranks: MakeRanks, cells: list[Cell]) -> None:
    for cell in cells:
        figure = law.check(ranks, cell)
        assert figure.holds, f"{law.name}: {figure} [{label(cell)}]"


def strict_ranks(size: int, body: Callable[[Any], Any], *, strict: str = "") -> list[Any]:
    """Thread ranks that refuse what NCCL cannot do."""
    return thread_ranks(size, body, strict="nccl")
