"""Plans whose cells were judged: what the rules refuse stands apart, with its reasons.

`load` and `from_flags` are those of `benchsuite/plan/plan.py`, judged. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchsuite import rules
from benchsuite.plan import plan as plans
from benchsuite.plan.cell import Cell
from benchsuite.plan.plan import Plan, Problem, Refused


def load(
    reference: str | Path,
    *,
    settings: Sequence[str] = (),
    only: str | None = None,
    seeds: Sequence[int] | None = None,
) -> Plan:
    """A plan by path or by name. UsageError says why it cannot be read."""
    return judged(plans.load(reference, settings=settings, only=only, seeds=seeds))


def from_flags(
    flags: Mapping[str, Any],
    *,
    settings: Sequence[str] = (),
    only: str | None = None,
    seeds: Sequence[int] | None = None,
) -> Plan:
    """A plan of the cells that flags of the command line describe."""
    return judged(plans.from_flags(flags, settings=settings, only=only, seeds=seeds))


def judged(plan: Plan) -> Plan:
    """The plan with the cells that a rule refuses among the refused."""
    return _apart(plan, {cell.id: rules.validate(cell) for cell in plan.cells})


def on_this_machine(plan: Plan, look: Callable[[], rules.Machine]) -> Plan:
    """The plan with what this machine cannot run among the refused.

    `look` examines the machine; it is called only where a cell depends on the answer.
    """
    if not any(rules.needs_machine(cell) for cell in plan.cells):
        return plan
    machine = look()
    return _apart(plan, {cell.id: rules.machine_problems(cell, machine) for cell in plan.cells})


def _apart(plan: Plan, problems: Mapping[str, Iterable[Problem]]) -> Plan:
    """The plan with the cells that have problems among the refused, in their order."""
    refused: list[Refused] = []
    kept: list[Cell] = []
    for cell in plan.cells:
        found = tuple(problems[cell.id])
        if found:
            refused.append(Refused(cell, found))
        else:
            kept.append(cell)
    return dataclasses.replace(plan, cells=tuple(kept), refused=(*plan.refused, *refused))
