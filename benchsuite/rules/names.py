"""The names that a member's conditions and sentences are about, looked up in a cell.

`benchsuite/plan/declared.py` lists them (`Refusal`). Imports no torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from benchsuite.plan import plugins
from benchsuite.plan.cell import AXES, Cell
from benchsuite.rules.view import View

CELL_NAMES = (
    *(field.name for field in dataclasses.fields(Cell)),
    *("num_workers", "num_servers", "world_size", "steps"),
)


def unknown(owner: str, attribute: str) -> str:
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


class Names:
    """Looks up the names of a member's conditions in a cell."""

    def __init__(self, view: View, axis: str) -> None:
        """axis: the one on which the member stands whose conditions are asked for."""
        self._view = view
        self._axis = axis

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
        """What the conditions ask of a member on an axis: name, declaration, or option.

        A declaration comes before an option of the same name, because its meaning is fixed by us.
        """
        view = self._view
        if attribute == "name":
            return view.label(axis)

        says = view.says(axis)
        if hasattr(says, attribute):
            return getattr(says, attribute)
        return view.option(axis, attribute)
