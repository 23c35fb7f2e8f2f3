"""What sentences are made of: best and worst, whether ranges touch, how strategies are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from benchsuite.plan import declared
from benchsuite.report import text
from benchsuite.report.material import Material
from benchsuite.report.words import labels

MANY = 4  # names in a sentence


@dataclass(frozen=True)
class Sentence:
    """One finding: what it is about, and the sentence."""

    topic: str
    text: str


def largest(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the largest number of workers at which at least two strategies stand."""
    counts = table.groupby("replicas")["series"].nunique()
    several = counts[counts > 1]
    return table[table["replicas"] == several.index.max()] if len(several) else table.iloc[:0]


def names(material: Material, *, short: bool = False) -> Callable[[str], str]:
    """How a sentence calls a series or, with `short`, a row of a figure.

    Topology and compression are left out where the plan has the synchronisation with one of them
    only; hosts are named where there are several.
    """
    hosts_of = {cell.id: cell.hosts for cell in material.cells}
    hosts = {
        str(row["series"]): hosts_of[row["cell_id"]] for row in material.names.to_dict("records")
    }
    strategies = {str(one).partition(" ")[0] for one in material.names["series"]}
    syncs = Counter(one.partition("/")[0] for one in strategies)

    def name(one: str) -> str:
        strategy, _, variant = one.partition(" ")
        sync = strategy.partition("/")[0]
        alone = syncs[sync] == 1 and not declared.label_with_topology(sync)
        called = f"{sync if alone else strategy} {variant}".strip()
        said = labels.short(called) if short else labels.label(called).replace(", ", " ")
        return f"{said}, {hosts[one]} hosts" if hosts.get(one, 1) > 1 else said

    return name


@dataclass(frozen=True)
class Ends:
    """What the best and the worst of a comparison are called, with the unit."""

    column: str
    better: str  # "max" or "min"
    best: str
    worst: str
    unit: str = ""
    scale: float = 1.0


def versus(rows: pd.DataFrame, ends: Ends, name: Callable[[str], str]) -> str:
    """Best and worst with their numbers, or that all ranges touch.

    E.g. `ring fastest, 23,310 [..] samples/s; server slowest, ..`.
    """
    pairs = [
        (name(str(s)), v) for s, v in zip(rows["series"], rows[ends.column], strict=True) if v.n
    ]
    pairs.sort(key=lambda pair: pair[1].center, reverse=ends.better == "max")
    (best_name, best), (worst_name, worst) = pairs[0], pairs[-1]
    apart = best.low > worst.high if ends.better == "max" else best.high < worst.low
    high, low = (text.quantity(v, scale=ends.scale) + ends.unit for v in (best, worst))

    if not apart:
        return (
            f"no difference seen between {best_name}, {high}, and {worst_name}, {low} (the "
            "ranges touch)"
        )

    ties = [
        n
        for n, v in pairs[1:-1]
        if (v.high >= best.low if ends.better == "max" else v.low <= best.high)
    ]
    close = f" (in its range: {few(ties)})" if ties else ""
    return f"{best_name} {ends.best}, {high}{close}; {worst_name} {ends.worst}, {low}"


def listed(names: list[str]) -> str:
    """Names in a sentence: `a, b and c`."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def few(names: list[str]) -> str:
    """The names, or how many there are where a reader would not finish the list."""
    return listed(names) if len(names) <= MANY else f"{len(names)} others"


def goal(target: Mapping[str, Any], key: str = "target") -> str:
    """A target in words: `97.5 % test accuracy`."""
    unit = f" {target['unit']}" if target.get("unit") else ""
    return f"{target[key]:g}{unit} {target['metric']}"


def number_of_launches(rows: pd.DataFrame) -> str:
    """How many launches stand behind the rows: `n = 3`, `n = 2 to 3`."""
    low = int(rows["n"].min())
    high = int(rows["n"].max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"
