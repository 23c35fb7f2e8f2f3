"""What the rules speak about: `Problem`, what is said; `View`, what is looked at. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from benchsuite.plan import cell as cells
from benchsuite.plan import members, plugins
from benchsuite.plan.cell import Cell


@dataclass(frozen=True)
class Problem:
    """Why a cell is refused, and what to do instead."""

    rule: str  # short name, e.g. "sync x topology"
    reason: str  # the values and the rule with numbers put in
    remedy: str  # what to set


Problems = Iterator[Problem]


class View:
    """A cell as the rules see it, resolved or not: members by name, options with their defaults.

    A plug-in given by path has no name here ("" is in no table): what it needs it says itself, in
    constants.
    """

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self._files: dict[str, plugins.Plugin | None] = {}

    def name(self, axis: str) -> str:
        """The member's name in the tables, "" for a plug-in given by path."""
        reference: str = getattr(self.cell, axis)
        return "" if plugins.is_path(reference) else reference

    def label(self, axis: str) -> str:
        """The name that the user knows it by."""
        return plugins.stem(getattr(self.cell, axis))

    def is_one_of(self, axis: str, names: Collection[str], *, own: bool = False) -> bool:
        """Whether the member is in a table; `own`: what a plug-in given by path counts as."""
        return self.name(axis) in names if self.name(axis) else own

    def file(self, axis: str) -> plugins.Plugin | None:
        """The member's file, None where it has none in this version. Looked for once: rules ask
        thirty times."""
        if axis not in self._files:
            self._files[axis] = members.find(axis, getattr(self.cell, axis))
        return self._files[axis]

    def constant(self, axis: str, name: str) -> Any:
        """A literal class attribute of the member's file."""
        file = self.file(axis)
        return None if file is None else file.constants.get(name)

    def option(self, axis: str, name: str) -> Any:
        """An option: as the cell says, else as the preset says, else the file's default; None = not
        known."""
        given = self.cell.options.get(self.label(axis), {})
        if name in given:
            return given[name]
        file = self.file(axis)
        if axis == "workload" and name in self.preset:
            return self.preset[name]
        return file.options[name].default if file is not None and name in file.options else None

    def number(self, axis: str, name: str) -> float | None:
        """An option that is a number, else None."""
        value = self.option(axis, name)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    @cached_property
    def preset(self) -> dict[str, Any]:
        """Values of the workload's preset; {} where it has no file."""
        file = self.file("workload")
        if file is None or not file.presets:
            return {}
        return dict(file.presets.get(self.cell.preset or next(iter(file.presets)), {}))

    @cached_property
    def global_batch(self) -> int:
        """Samples of a synchronous step; 0 = not known."""
        return cells.global_batch(self.cell)

    @cached_property
    def samples(self) -> int | None:
        """The budget in samples; None = not known."""
        budget = self.cell.budget
        if budget.samples is not None:
            return budget.samples
        if budget.steps is not None:
            return budget.steps * self.global_batch if self.global_batch else None
        return self.preset.get("budget_samples")

    @cached_property
    def steps(self) -> int | None:
        """Synchronous steps of the budget; None = not known."""
        if self.samples is None or not self.global_batch:
            return self.cell.budget.steps
        return self.samples // self.global_batch
