"""What members refuse of themselves: the `refuses`, `at_least` and `smallest_replicas` of a file.

The sentences stand in the members' files (`benchsuite/plan/declared.py` says how they are written);
here they are evaluated. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from benchsuite.plan import declared, plugins
from benchsuite.plan.cell import AXES, Cell
from benchsuite.plan.plugins import PluginError
from benchsuite.rules.view import Problem, Problems, View

PLACE = 35  # after the numbers of the cell
ORDER = ("sync", "topology", "compression", "workload", "parallel")
CELL_NAMES = (
    *(field.name for field in dataclasses.fields(Cell)),
    *("num_workers", "num_servers", "world_size", "steps"),
)


def refused(view: View) -> Problems:
    """Every condition of a member that holds, with the member's own sentences."""
    for axis in ORDER:
        path = view.file(axis).path
        for refusal in view.says(axis).refuses:
            names = Names(view, axis)
            for owner, attribute in declared.names_in(refusal):
                problem = names.unknown(owner, attribute)
                if problem:
                    raise PluginError(f"{path}: refuses {refusal.rule!r}: {problem}")
            if refusal.when.holds(names):
                yield Problem(refusal.rule, refusal.reason.said(names), refusal.remedy.said(names))


def at_least(view: View) -> Problems:
    """Options that count something: threads, periods, segments, micro-batches."""
    for axis in ORDER:
        for name, least in view.says(axis).at_least.items():
            value = view.number(axis, name)
            if value is not None and value < least:
                yield Problem(
                    "counts",
                    f"{name} = {value:g} of {view.label(axis)}: at least {least} is needed",
                    f"set options.{view.label(axis)}.{name} = {least} or more",
                )


def smallest(view: View) -> Problems:
    """The least number of replicas that a member makes sense with."""
    for axis in ORDER:
        least = view.says(axis).smallest_replicas
        if view.cell.replicas < least:
            yield Problem(
                "smallest",
                f"replicas = {view.cell.replicas} with {axis} = {view.label(axis)}: at least "
                f"{least} are needed",
                f"set replicas = {least} or more",
            )


class Names:
    """Looks up the names of a member's conditions in a cell."""

    def __init__(self, view: View, axis: str) -> None:
        self._view = view
        self._axis = axis

    def unknown(self, owner: str, attribute: str) -> str:
        """Says that nobody has such a name; "" where somebody may."""
        if not attribute:
            return ""  # an option of the member itself: known since its file was read
        if owner in AXES:
            return ""  # another member may have the option or not
        if owner not in ("cell", "default"):
            return plugins.unknown("name", owner, ("cell", "default", *AXES))
        if attribute not in CELL_NAMES:
            return plugins.unknown("field", attribute, CELL_NAMES, of=owner)
        return ""

    def __call__(self, owner: str, attribute: str) -> Any:
        """The value of `owner.attribute`. None = not known: no order and no sum, and false."""
        view = self._view
        if owner == "name":
            return view.label(self._axis)
        if not attribute:
            return view.option(self._axis, owner)
        if owner == "default":
            return getattr(Cell, attribute)
        if owner == "cell":
            return view.steps if attribute == "steps" else getattr(view.cell, attribute)
        return self._of_member(owner, attribute)

    def _of_member(self, axis: str, attribute: str) -> Any:
        view = self._view
        if attribute == "name":
            return view.label(axis)
        says = view.says(axis)
        if hasattr(says, attribute):
            return getattr(says, attribute)
        return view.option(axis, attribute)


RULES: tuple[Callable[[View], Problems], ...] = (refused, at_least, smallest)
