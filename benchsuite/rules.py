"""Which combinations mean something. Thin for the moment."""

from __future__ import annotations

from dataclasses import dataclass

from benchsuite.cell import Cell


@dataclass(frozen=True)
class Problem:
    """Why a cell is refused, and what to do instead."""

    rule: str
    reason: str
    remedy: str


def validate(cell: Cell) -> list[Problem]:
    """Every problem of a cell; [] = it is legal."""
    return []
