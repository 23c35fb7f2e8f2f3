"""What the rules speak about: `Problem`, what is said; `View`, what is looked at.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

from benchsuite.plan import cell as cells
from benchsuite.plan import declared, plugins
from benchsuite.plan.cell import Cell
from benchsuite.plan.plan import Problem as Problem

Problems = Iterator[Problem]


class View:
    """A cell as the rules see it, resolved or not: what its members declare, options with defaults.

    Rules ask for declarations and options, never for the name of a member, so that a user's file
    by path is judged as a member is.
    """

    def __init__(self, cell: Cell) -> None:
        """Looks nothing up yet: most rules ask for little, and a plan has thousands of cells."""
        self.cell = cell
        self._files: dict[str, plugins.Plugin] = {}
        self._says: dict[str, declared.Declared] = {}

    def label(self, axis: str) -> str:
        """The name that the user knows the member by."""
        return plugins.stem(getattr(self.cell, axis))

    def file(self, axis: str) -> plugins.Plugin:
        """The member's file. It is looked for once, since rules ask some thirty times."""
        if axis not in self._files:
            self._files[axis] = plugins.find(axis, getattr(self.cell, axis))
        return self._files[axis]

    def says(self, axis: str) -> declared.Declared:
        """What the member on an axis declares of itself."""
        if axis not in self._says:
            self._says[axis] = declared.of(axis, getattr(self.cell, axis))
        return self._says[axis]

    @cached_property
    def sync(self) -> declared.Strategy:
        """What the strategy declares."""
        return cast(declared.Strategy, self.says("sync"))

    @cached_property
    def topology(self) -> declared.Topology:
        """What the topology declares."""
        return cast(declared.Topology, self.says("topology"))

    @cached_property
    def compression(self) -> declared.Compression:
        """What the compression declares."""
        return cast(declared.Compression, self.says("compression"))

    @cached_property
    def parallel(self) -> declared.Parallel:
        """What the parallelism declares."""
        return cast(declared.Parallel, self.says("parallel"))

    @cached_property
    def workload(self) -> declared.Workload:
        """What the workload declares."""
        return cast(declared.Workload, self.says("workload"))

    @property
    def has_servers(self) -> bool:
        """Whether the topology has servers besides its workers."""
        return self.topology.kind == declared.SERVER

    def is_over(self, allowed: Iterable[str]) -> bool:
        """Whether the topology is one of these kinds or names.

        A user's file is never meant by a name. One that does not say its kind is taken for a
        collective and for a graph: its owner knows which.
        """
        allowed = tuple(allowed)
        file = self.file("topology")
        if not file.given_by_path and file.name in allowed:
            return True
        if self.topology.kind:
            return self.topology.kind in allowed
        return declared.COLLECTIVE in allowed or declared.GRAPH in allowed

    def option(self, axis: str, name: str) -> Any:
        """An option as the cell says, else as the preset says, else the file's default.

        None where the member has no such option.
        """
        given = self.cell.options.get(self.label(axis), {})
        if name in given:
            return given[name]
        if axis == "workload" and name in self.preset:
            return self.preset[name]

        options = self.file(axis).options
        return options[name].default if name in options else None

    def number(self, axis: str, name: str) -> float | None:
        """An option that is a number, else None. True is none, though it is an int for Python."""
        value = self.option(axis, name)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    @cached_property
    def preset(self) -> dict[str, Any]:
        """Values of the workload's preset; {} where it has none."""
        presets = self.file("workload").presets
        if not presets:
            return {}
        return dict(presets.get(self.cell.preset or next(iter(presets)), {}))

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


def names_of(axis: str, **wanted: object) -> tuple[str, ...]:
    """Names of the members that ship with the suite and declare these values."""
    folder = plugins.KINDS[axis][0]
    return _names_of(axis, folder, declared.members(axis), tuple(wanted.items()))


@lru_cache(maxsize=256)
def _names_of(
    axis: str, folder: Path, names: tuple[str, ...], wanted: tuple[tuple[str, object], ...]
) -> tuple[str, ...]:
    """It is cached, because grids of cells are refused by the thousand with the same remedies."""
    del folder  # part of the cache key only
    found = []
    for name in names:
        says = declared.of(axis, name)
        if all(getattr(says, key) == value for key, value in wanted):
            found.append(name)
    return tuple(found)


def topologies(allowed: Iterable[str]) -> tuple[str, ...]:
    """Names of the topologies that these kinds and names stand for, in order, each once."""
    found: list[str] = []
    for each in allowed:
        found += names_of("topology", kind=each) if each in declared.TOPOLOGY_KINDS else [each]
    return tuple(dict.fromkeys(found))


def one_of(names: tuple[str, ...]) -> str:
    """`ring`, or `one of ring, tree`."""
    return names[0] if len(names) == 1 else "one of " + ", ".join(names)
