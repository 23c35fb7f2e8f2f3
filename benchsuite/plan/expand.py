"""The grid of a plan: its tables `cells`, `cells.also`, `exclude` and `budget` made into cells.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchsuite.errors import UsageError
from benchsuite.plan import cell as cells
from benchsuite.plan import compute_time, fields, plugins
from benchsuite.plan.cell import AXES, Budget, Cell


def check_shapes(document: Mapping[str, Any]) -> None:
    """Checks that tables and lists of tables stand where the plan needs them.

    What stands inside them is checked where it is read. Raises UsageError with an example of what
    to write; without this check a text in the place of a table would be read letter by letter.
    """
    base = _table("cells", document.get("cells", {}), "[cells]")
    also = _tables_of("cells.also", base.get("also", []), "[[cells.also]]")
    excludes = _tables_of("exclude", document.get("exclude", []), "[[exclude]]")
    _tables_of("figures", document.get("figures", []), "[[figures]]")
    _table("budget", document.get("budget", {}), "[budget]")

    for owner, block in (
        ("cells", base),
        *(("cells.also", each) for each in also),
        *(("exclude", each) for each in excludes),
    ):
        _table(f"{owner}.budget", block.get("budget", {}), "budget = { samples = 640 }")
        options = _table(
            f"{owner}.options",
            block.get("options", {}),
            "options = { ring = { segment_kib = 64 } }",
        )
        for member, values in options.items():
            _table(f"{owner}.options.{member}", values, f"options = {{ {member} = {{ .. }} }}")


def _table(name: str, value: Any, example: str) -> Mapping[str, Any]:
    """The value, which has to be a table; UsageError shows an example."""
    if not isinstance(value, Mapping):
        raise UsageError(f"{name} takes a table, not {value!r}: write {example}")
    return value


def _tables_of(name: str, value: Any, example: str) -> Sequence[Mapping[str, Any]]:
    """The value, which has to be a list of tables; UsageError shows an example."""
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise UsageError(f"{name} takes a list of tables, not {value!r}: write {example}")
    return value


def expand(document: Mapping[str, Any], folder: Path, used: set[str]) -> tuple[list[Cell], int]:
    """Resolved cells of all blocks, each once, and how many the excludes took out.

    document: the plan with its shapes checked. folder: of the plan, for paths that are relative to
    it. used: the names of all members that a cell uses are added to it, also of excluded cells.

    Raises UsageError for a key, a member or a value that is not known.
    """
    base = dict(document.get("cells", {}))
    also = base.pop("also", [])

    for block in [base, *also]:
        known_keys(block, fields.FIELDS, "[cells]")
        _check_option_tables(block, base)

    excludes = [_exclude(entry) for entry in document.get("exclude", ())]

    # Keyed by id after `resolve`: two blocks that give the same cell in other words give it once.
    made: dict[str, Cell] = {}

    excluded: set[str] = set()

    # A further block takes over what the first one says and does not say again.
    for block in [base, *({**base, **extra} for extra in also)]:
        for cell in _cross(block, document.get("budget", {}), folder):
            # Noted before the excludes: an option of an excluded member is no spelling mistake.
            used.update(plugins.stem(getattr(cell, axis)) for axis in AXES)
            resolved = cells.resolve(cell)
            if any(_matches(resolved, entry) for entry in excludes):
                excluded.add(resolved.id)
            else:
                made.setdefault(resolved.id, resolved)

    return list(made.values()), len(excluded)


def beside(reference: str, folder: Path) -> str:
    """A file given by path, relative to here, or where there is none, to the plan's folder."""
    if (
        plugins.is_path(reference)
        and not Path(reference).expanduser().is_file()
        and (folder / reference).is_file()
    ):
        return str(folder / reference)
    return reference


def _cross(block: Mapping[str, Any], shared_budget: Any, folder: Path) -> Iterator[Cell]:
    """Every cell of a block: lists crossed, options only for the members that a cell uses.

    Options belong to members and not to cells: crossing `ring.segment_kib` with a cell that has no
    ring would give that cell once per value.
    """
    options = block.get("options", {})
    budgets = _budgets(shared_budget, block.get("budget", {}))

    names = [name for name in block if name not in ("options", "budget")]
    values = [[fields.check(name, value) for value in _values(name, block[name])] for name in names]

    for point in itertools.product(*values):
        chosen = dict(zip(names, point, strict=True))
        for axis in (*AXES, "cluster"):
            if axis in chosen:
                chosen[axis] = beside(chosen[axis], folder)
        chosen["compute_time"] = compute_time.resolved(chosen.get("compute_time"), folder)
        plain = Cell(**chosen)

        # Made without options first, because only the cell says which members it uses.
        used = [
            member
            for member in options
            if member in {plugins.stem(getattr(plain, axis)) for axis in AXES}
        ]

        for settings in itertools.product(*(_tables(options[member]) for member in used)):
            given = dict(zip(used, settings, strict=True))
            for budget in budgets:
                yield dataclasses.replace(plain, options=given, budget=budget)


def _values(name: str, value: Any) -> list[Any]:
    """The values that a field is crossed over; UsageError where there are none."""
    if name == "faults":
        return [value]  # a list of tables is one value
    values = fields.listed(value)
    if not values:
        raise UsageError(f"{name} = []: an empty list crosses to no cell; give at least one value")
    return values


def _tables(table: Any) -> list[dict[str, Any]]:
    """`{a = [1, 2], b = 3}` as [{a: 1, b: 3}, {a: 2, b: 3}]."""
    if not isinstance(table, Mapping):
        raise UsageError(f"expected a table, got {table!r}")
    values = [
        [_scalar(name, each) for each in _values(name, value)] for name, value in table.items()
    ]
    return [dict(zip(table, point, strict=True)) for point in itertools.product(*values)]


def _scalar(name: str, value: Any) -> Any:
    """One value of an option, which has to be finite: NaN equals nothing, not even itself, so a
    cell with it would be missing for ever.
    """
    if not isinstance(value, (bool, int, float, str)) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise UsageError(f"{name} takes a finite number, a word, true or false, not {value!r}")
    return value


def _budgets(shared: Any, own: Any) -> list[Budget]:
    """The budgets of a block: those of the plan, with what the block says itself put over them."""
    merged = dict(shared) if isinstance(shared, Mapping) else shared
    if isinstance(own, Mapping) and isinstance(merged, dict):
        for key in own:
            # A block that gives steps must not inherit samples from the plan beside them.
            drop_other(merged, [key])
        merged.update(own)

    return [fields.budget(table) for table in _tables(merged)]


def _check_option_tables(block: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Checks that `[cells.options.<member>]` names a member that exists.

    No cell of this plan need use it.
    """
    known = {name for axis in AXES for name in plugins.names(axis)}

    for source in (base, block):
        known |= {
            plugins.stem(str(value))
            for axis in AXES
            for value in fields.listed(source.get(axis, []))
        }

    options = block.get("options", {})
    if not isinstance(options, Mapping):
        raise UsageError(f"options takes tables, not {options!r}: write [cells.options.<member>]")

    # A misspelt member would leave its options unused, and the plan would run the defaults.
    for member in options:
        if member not in known:
            raise UsageError(plugins.unknown("member", member, sorted(known), of="[cells.options]"))


def _exclude(entry: Any) -> dict[str, Any]:
    """An exclude whose keys, members and values are known; UsageError otherwise.

    One with a spelling mistake would match nothing, and run what was meant to be left out.
    """
    if not isinstance(entry, Mapping) or not entry:
        raise UsageError(
            f"exclude takes tables of fields, not {entry!r}: write [[exclude]] and below it sync "
            "= ..."
        )

    known_keys(entry, fields.FIELDS, "[[exclude]]")

    # Found only to be sure that there is such a member.
    for axis in AXES:
        for value in fields.listed(entry.get(axis, [])):
            plugins.find(axis, fields.check(axis, value))

    return dict(entry)


def _matches(cell: Cell, entry: Mapping[str, Any]) -> bool:
    """Whether every key of an exclude holds for the cell; a list holds where one of its values
    does.

    cell: resolved, so that defaults can be excluded as well.
    """
    document = cell.to_json()

    for name, wanted in entry.items():
        if name == "options":
            for member, settings in wanted.items():
                own = document["options"].get(member, {})
                if any(own.get(key) not in fields.listed(value) for key, value in settings.items()):
                    return False

        elif name in AXES:
            # By stem, since a path may be written in several ways.
            if plugins.stem(document[name]) not in [
                plugins.stem(value) for value in fields.listed(wanted)
            ]:
                return False
        elif name == "budget":
            if any(
                document["budget"].get(key) not in fields.listed(value)
                for key, value in wanted.items()
            ):
                return False
        # Checked first, so that 4 and 4.0, or "none" and nothing, are one value here as they are in
        # a cell.
        elif document[name] not in [fields.check(name, value) for value in fields.listed(wanted)]:
            return False

    return True


def drop_other(budget: Any, given: Sequence[str]) -> None:
    """`samples` and `steps` exclude each other: the one just given wins.

    budget: changed in place. given: the keys that were just written.
    """
    for key, other in (("samples", "steps"), ("steps", "samples")):
        if key in given and isinstance(budget, dict):
            budget.pop(other, None)


def known_keys(table: Any, known: Sequence[str], owner: str) -> None:
    """UsageError for a key that is not known, the nearest known one first.

    A misspelt key would otherwise do nothing, and the plan run with a default in its place. owner:
    whose key it is, for the message.
    """
    if not isinstance(table, Mapping):
        raise UsageError(f"{owner} takes a table, not {table!r}")
    for key in table:
        if key not in known:
            raise UsageError(plugins.unknown("key", key, known, of=owner))
