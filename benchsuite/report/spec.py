"""The `[[figures]]` entries of a plan, checked: what a page shows, of which cells, in which order.

    [[figures]]
    kind = "metric_against"              # a file of figures/ or tables/, or the path of your own
    title = "Does it train?"             # heading on the page; default: the kind's own
    name = "curves"                      # file name under figures/ or tables/; default: the kind
    x = ["samples", "seconds", "bytes"]  # a key of the kind's own: see `KIND` in its file
    where = { straggler = false, replicas = [1, 2, 4], topology = "ring" }
                                         # the cells that are drawn; default: all.
                                         # straggler: true, false, or factors of the slowest
                                         # worker (1 = nobody slowed)

Keys of their own: x (metric_against: one figure each; to_target: a column each), y (metric_against:
a row of panels each; virtual_scaling: one figure each; virtual_tuning: one of them), goal (easy,
target or hard: which target counts as reached), columns (tables: which of them; virtual_scaling:
what panels side by side differ in) and rows (virtual_scaling: panels below each other).

This file imports neither pandas nor matplotlib: plans are read with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchsuite.errors import UsageError
from benchsuite.plan import plugins
from benchsuite.plan.cell import Cell
from benchsuite.report import kinds

WHERE = (
    "workload",
    "preset",
    "parallel",
    "model_parallel",
    "sync",
    "topology",
    "compression",
    "replicas",
    "servers",
    "straggler",
    "clock",
    "gradients",
    "link_mbit",
    "compute_time",
    "tuning",
    "lr_factor",
)
_SHARED = ("kind", "title", "name", "where")


@dataclass(frozen=True)
class FigureSpec:
    """One `[[figures]]` entry, checked and with its defaults filled in."""

    kind: str
    name: str
    title: str
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # x, y, columns
    where: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def wants(self, cell: Cell) -> bool:
        """Whether the entry's filter lets this cell in."""
        for key, allowed in self.where.items():
            if key == "straggler":
                if not any(_slowed(cell, wanted) for wanted in allowed):
                    return False
                continue

            if key == "servers":
                value: Any = cell.num_servers
            elif key == "compute_time":
                value = (cell.compute_time or {}).get("kind", "")
            else:
                value = getattr(cell, key)
                value = (
                    "none"
                    if value is None
                    else plugins.stem(value)
                    if isinstance(value, str)
                    else value
                )

            if value not in allowed:
                return False

        return True


def _slowed(cell: Cell, wanted: Any) -> bool:
    if isinstance(wanted, bool):
        return bool(cell.straggler) == wanted
    return bool(max(cell.straggler.values(), default=1.0) == wanted)


def parse(entries: Iterable[Mapping[str, Any]], cells: Iterable[Cell] = ()) -> list[FigureSpec]:
    """The checked entries, with unique names.

    Without entries: one of each kind of a plain page that has something to show of `cells`.
    UsageError for an unknown kind, key or value, with the nearest known one first.
    """
    listed = list(entries) or [{"kind": kind} for kind in _worth_drawing(list(cells))]
    specs: list[FigureSpec] = []

    for entry in listed:
        spec = _parse_one(entry)
        taken = [
            other.name for other in specs if other.kind == spec.kind or other.name == spec.name
        ]

        if spec.name in taken:
            if "name" in entry:
                raise UsageError(f"two figures are named {spec.name!r}: give each its own name")
            spec = FigureSpec(
                spec.kind, f"{spec.name}_{len(taken) + 1}", spec.title, spec.values, spec.where
            )

        specs.append(spec)

    return specs


def _worth_drawing(cells: Sequence[Cell]) -> list[str]:
    """The kinds of a plain page that have something to show of these cells."""
    clocks = {cell.clock for cell in cells} or {"wall"}
    wanted = []

    for name in kinds.of_a_plain_page():
        kind = kinds.find(name).kind
        pointless = any(
            all(getattr(cell, key) == value for cell in cells)
            for key, value in kind.not_where_all.items()
        )
        if kind.clocks <= clocks and not pointless:
            wanted.append(name)

    return wanted


def _parse_one(entry: Mapping[str, Any]) -> FigureSpec:
    kind = str(entry.get("kind", ""))
    declared = kinds.find(kind).kind
    own = declared.keys

    for key in entry:
        if key not in (*_SHARED, *own):
            raise UsageError(plugins.unknown("key", key, (*_SHARED, *own), of=f"figure {kind}"))

    values = {}

    for key, known in own.items():
        default = tuple(value for value in known if value not in declared.only_asked)
        values[key] = tuple(str(value) for value in _listed(entry.get(key, default)))

        for value in values[key]:
            if value not in known:
                raise UsageError(plugins.unknown(key, value, known, of=f"figure {kind}"))

    where = {}

    for key, wanted in entry.get("where", {}).items():
        if key not in WHERE:
            raise UsageError(plugins.unknown("filter", key, WHERE, of=f"figure {kind}"))
        where[key] = tuple(_listed(wanted))

    name = str(entry.get("name", plugins.stem(kind)))

    if not name.replace("_", "").replace("-", "").isalnum():
        raise UsageError(
            f"figure name {name!r} becomes a file name: letters, digits, '-' and '_' only"
        )

    return FigureSpec(kind, name, str(entry.get("title", declared.title)), values, where)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]
