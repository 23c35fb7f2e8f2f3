"""What all runs of one command share: machine, environment, code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchsuite.plan.cell import Cell
from benchsuite.results.store import CodeId


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a command runs and with which code; every run that it stores says so."""

    machine: str
    environment_id: str
    code_id: Callable[[Cell], str]
    rules_id: CodeId  # stands for the code of a refused cell
