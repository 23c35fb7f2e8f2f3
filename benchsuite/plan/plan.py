"""A plan: one TOML file that states a question and a grid, made into cells.

Lists are crossed, `[[cells.also]]` adds blocks that are not crossed with the first, `[[exclude]]`
takes cells out. `load` reads a plan by path or by name, `from_flags` makes one of a single cell;
both take `--set`, `--only` and `--seeds`. Which of the cells mean something is not asked here:
`benchsuite/rules/plans.py` has the same two functions for a plan that was judged. Imports no torch.
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchsuite.errors import UsageError
from benchsuite.plan import expand, fields, plugins
from benchsuite.plan.cell import AXES, Cell
from benchsuite.plan.selection import Selection

KEYS = ("question", "seeds", "cells", "exclude", "budget", "figures")
Document = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Why a cell is refused, and what to do instead."""

    rule: str  # short name, e.g. "sync x topology"
    reason: str  # the values and the rule with numbers put in
    remedy: str  # what to set


@dataclass(frozen=True)
class Refused:
    """A cell that means nothing or that this version cannot run, with one reason or more."""

    cell: Cell
    problems: tuple[Problem, ...]

    @property
    def reason(self) -> str:
        """One line: every reason with its remedy."""
        return "; ".join(f"{problem.reason}: {problem.remedy}" for problem in self.problems)


@dataclass(frozen=True)
class Plan:
    """Resolved cells without duplicates, in the order written. `seeds` apply to every cell.

    `refused` is empty until the rules have judged the cells (`benchsuite.rules.plans.judged`).
    """

    name: str
    path: Path | None  # None = from flags
    question: str
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    refused: tuple[Refused, ...]
    num_excluded: int
    figures: tuple[Mapping[str, Any], ...]
    text: str  # of the file, as it was read
    pairs: frozenset[tuple[str, int]] | None = (
        None  # (cell id, seed) that are meant; None = every cell, every seed
    )

    def runs(self) -> list[Cell]:
        """Every cell with every seed, all cells of a seed before the next seed.

        Interrupted, it leaves whole repetitions and not single cells with all their seeds.
        """
        return [
            cell.with_seed(seed)
            for seed in self.seeds
            for cell in self.cells
            if self._means(cell, seed)
        ]

    def refused_runs(self) -> list[tuple[Cell, str]]:
        """The refused cells with every seed, in the same order, each with its reason."""
        asked = [
            (each, seed)
            for seed in self.seeds
            for each in self.refused
            if self._means(each.cell, seed)
        ]
        return [(each.cell.with_seed(seed), each.reason) for each, seed in asked]

    def _means(self, cell: Cell, seed: int) -> bool:
        """Whether the plan asks for this cell with this seed."""
        return self.pairs is None or (cell.id, seed) in self.pairs


def load(
    reference: str | Path,
    *,
    settings: Sequence[str] = (),
    only: str | None = None,
    seeds: Sequence[int] | None = None,
) -> Plan:
    """A plan by path, or by name: `quick` is reports/quick.toml here, else the one shipped.

    settings: `KEY=VALUE`, as `--set` takes them. only: keeps the cells for which this expression
    holds. seeds: instead of the plan's.

    Raises UsageError, which begins with the file, where it cannot be read or says something that
    means no cell.
    """
    path = locate(str(reference))

    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error

    try:
        return _expand(document, path.stem, path, text, settings=settings, only=only, seeds=seeds)
    except UsageError as error:
        # Of the same type, since PluginError is told apart by some callers.
        raise type(error)(f"{path}: {error}") from error


def from_flags(
    flags: Mapping[str, Any],
    *,
    settings: Sequence[str] = (),
    only: str | None = None,
    seeds: Sequence[int] | None = None,
) -> Plan:
    """A plan of the cells that flags of the command line describe; None = a flag was not given.

    flags: field of a cell -> text. The rest is as for `load`. Text is read as `--set` reads it, so
    that `--replicas 1,2,4` gives three cells.
    """
    document: Document = {"question": "", "seeds": [0], "cells": {}}
    given = [f"{name}={value}" for name, value in flags.items() if value is not None]
    return _expand(document, "cell", None, "", settings=[*given, *settings], only=only, seeds=seeds)


def folders() -> list[Path]:
    """Folders where plans are looked up by name, in this order.

    They are `reports` where the user stands, in the installed package, and in the clone that this
    code runs from.
    """
    return [Path.cwd() / "reports", plugins.PACKAGE / "plans", plugins.PACKAGE.parent / "reports"]


def available() -> dict[str, Path]:
    """Plans by name, as `locate` would find them.

    Of two plans of one name the user's own is found, because it stands in the first folder.
    """
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("*.toml")):
            # The first folder wins, as it does in `locate`.
            found.setdefault(path.stem, path)
    return found


def locate(reference: str) -> Path:
    """The plan's file. UsageError lists the known names, the nearest first.

    reference: a path where it ends with .toml or holds a slash, else a name.
    """
    if reference.endswith(".toml") or "/" in reference:
        path = Path(reference).expanduser()
        if not path.is_file():
            raise UsageError(
                f"plan {reference!r}: no such file; known by name: "
                f"{', '.join(available()) or 'none'}"
            )

        return path

    known = available()
    if reference not in known:
        raise UsageError(plugins.unknown("plan", reference, known))
    return known[reference]


def apply_overrides(document: Document, settings: Iterable[str]) -> Document:
    """The document with every `KEY=VALUE` put in; the value holds for every block of the plan.

    Keys: a field of a cell (`replicas=1,2`, `precision=fp64`), `budget.samples`, `straggler.0`,
    `options.<member>.<option>`, `seeds`. The document that was given stays as it is. Raises
    UsageError for a key that is none.
    """
    document = copy.deepcopy(document)

    for setting in settings:
        (key, *rest), value, text = fields.assignment(setting)

        base = document.setdefault("cells", {})
        if key == "seeds" and not rest:
            document["seeds"] = fields.listed(value)
        elif key == "budget":
            for block in [document, base, *base.get("also", ())]:
                # Blocks with a budget of their own would otherwise keep it, and the flag would hold
                # for some cells only.
                if block is document or "budget" in block:
                    _set(block, [key, *rest], value)
                    expand.drop_other(block["budget"], rest[-1:])
        else:
            fields.known(key)
            if key in AXES or key in ("preset", "cluster"):
                # A member's name is taken as it was written, e.g. `1e3` or `true`.
                value = value if isinstance(value, list) else text.strip("\"'")

            for block in [base, *base.get("also", ())]:
                # The base block gives it to all blocks that do not say it themselves.
                if block is base or key in block:
                    _set(block, [key, *rest], value)

    return document


def _set(table: Document, keys: Sequence[str], value: Any) -> None:
    """Puts a value at a dotted key; where a list of tables stands on the way, into each."""
    *path, last = keys
    if path:
        inner = table.setdefault(path[0], {})
        for each in fields.listed(inner):
            if not isinstance(each, dict):
                raise UsageError(f"{'.'.join(keys)}: {path[0]} is {each!r}, not a table")
            _set(each, keys[1:], value)
    else:
        table[last] = value


def _expand(
    document: Document,
    name: str,
    path: Path | None,
    text: str,
    *,
    settings: Sequence[str],
    only: str | None,
    seeds: Sequence[int] | None,
) -> Plan:
    """The plan of a document: overrides put in, lists crossed, members found, cells chosen.

    name, path and text: of the file, for the plan itself. Raises UsageError.
    """
    expand.check_shapes(document)
    # The shapes are checked before, because overrides walk through the tables, and after, because
    # they may have put a word in the place of one.
    document = apply_overrides(document, settings)
    expand.check_shapes(document)
    expand.known_keys(document, KEYS, "a plan")

    used: set[str] = set()
    folder = path.parent if path else Path()
    made, num_excluded = expand.expand(document, folder, used)

    # In a plan's file unused options are allowed, since blocks may share them; on the command line
    # they are spelling mistakes.
    for setting in settings:
        keys = fields.assignment(setting)[0]
        if keys[0] == "options" and len(keys) > 1 and keys[1] not in used:
            raise UsageError(
                plugins.unknown(
                    "member", keys[1], sorted(used), of="this plan's cells (--set options)"
                )
            )

    if only is not None:
        made = _selected(made, only)

    return Plan(
        name=name,
        path=path,
        question=str(document.get("question", "")),
        seeds=checked_seeds(document.get("seeds", [0]) if seeds is None else seeds),
        cells=tuple(made),
        refused=(),
        num_excluded=num_excluded,
        figures=tuple(_placed(figure, folder) for figure in document.get("figures", ())),
        text=text,
    )


def _placed(figure: Any, folder: Path) -> Any:
    """A `[[figures]]` entry whose kind, where it is a path, leads to the file from anywhere.

    Whatever is no table with a kind is left as it is: `report/spec.py` says what is wrong with it.
    """
    if not isinstance(figure, Mapping) or not isinstance(figure.get("kind"), str):
        return figure
    return {**figure, "kind": expand.beside(figure["kind"], folder)}


def _selected(made: list[Cell], only: str) -> list[Cell]:
    """The cells that `--only` keeps. UsageError where it keeps none: nobody asks for nothing."""
    selection = Selection(only)
    kept = [cell for cell in made if selection.keeps(cell)]
    if not kept:
        shown = f"; the first of them: {made[0].label}" if made else ""
        raise UsageError(f"--only {only!r} keeps none of {len(made)} cells{shown}")
    return kept


def checked_seeds(values: Any) -> tuple[int, ...]:
    """Integers from 0 to 2**63 - 1, each once; UsageError where they are not.

    Larger ones would not fit the integer columns of the results, 64 bits with a sign.
    """
    given = list(values) if isinstance(values, range) else fields.listed(values)
    seeds = [fields.number("seeds", value, kind="int") for value in given]
    if not seeds or any(seed is None or not 0 <= seed < 2**63 for seed in seeds):
        raise UsageError(
            f"seeds = {given!r}: give at least one integer from 0 to 2**63 - 1, e.g. seeds = [0, "
            "1, 2]"
        )

    # A dict keeps the order in which they were written, which a set would not.
    return tuple(dict.fromkeys(int(seed) for seed in seeds if seed is not None))
