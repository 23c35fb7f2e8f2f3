"""What pictures with a row per strategy share: cells that may be compared, rows, captions.

A drawing is of one workload, one number of workers, and under the virtual clock one world of
compute times and links, so a strategy has one cell per slowed worker. Seconds are wall seconds or
virtual ones by the material's clock, never both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from benchsuite.analysis.arrival import TUNED, arrivals
from benchsuite.report import text
from benchsuite.report.drawing.rows import Row
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec
from benchsuite.report.words import labels
from benchsuite.report.words.sentences import names

WORLD = ("workload", "replicas", "spread", "link")


AXES = {  # quantity -> title of its column, axis, unit
    "seconds": ("time to target", "seconds", ""),
    "samples": ("samples to target", "samples", ""),
    "bytes": ("bytes to target", "all ranks", "B"),
}


def worlds(spec: FigureSpec, material: Material) -> Iterator[tuple[str, pd.DataFrame]]:
    """The cells that may share one drawing, each group with the suffix of its file's name.

    Each group is a table of `analysis.arrival.arrivals`. Where all cells are tuned, the names of
    their series do not say so.
    """
    goal = spec.values.get("goal", ("target",))[0]
    wanted = material.of(material.names, spec)
    table = arrivals(material.runs, wanted, goal=goal).sort_values("order", kind="stable")
    if set(table["tuning"]) == {TUNED}:
        table["series"] = table["base"]
    groups = [group for _, group in table.groupby(list(WORLD), sort=False)]
    for position, group in enumerate(groups):
        yield (f"_{position + 1}" if len(groups) > 1 else ""), group


def both(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose strategy ran, with the same straggler, under either tuning."""
    kinds = table.groupby(["base", "straggler"])["tuning"].transform("nunique")
    return table[kinds == 2]


def factors(row: Mapping[Any, Any]) -> str:
    """The chosen factors of the learning rate, `×2`; empty where no trial ended."""
    return ", ".join(f"×{factor:g}" for factor in row["lr_factors"])


def stragglers(table: pd.DataFrame) -> list[str]:
    """The texts of who is slowed: nobody first, then by factor."""
    pairs = {
        (float(s), str(who)) for s, who in zip(table["slowdown"], table["straggler"], strict=True)
    }
    return [who for _, who in sorted(pairs)]


def listed(table: pd.DataFrame, material: Material) -> list[Row]:
    """One row per series in the plan's order; series of one synchronisation stand together."""
    name = names(material, short=True)
    groups: dict[str, list[Row]] = {}
    for one in dict.fromkeys(map(str, table["series"])):
        sync = one.partition("/")[0]
        groups.setdefault(sync, []).append(Row(one, name(one), sync))
    return [row for group in groups.values() for row in group]


def said_of_arrivals(spec: FigureSpec, table: pd.DataFrame, material: Material) -> str:
    """What was counted until which target, and what mark and line of a row are."""
    goal = spec.values.get("goal", ("target",))[0]
    target = material.target(str(table["workload"].iloc[0]))
    seconds = (
        "virtual seconds" if material.clock == "virtual" else "wall seconds, evaluation excluded"
    )
    sign = "≥" if target["direction"] == "max" else "≤"
    unit = f" {target['unit']}" if target.get("unit") else ""
    return (
        f"What it took until an evaluation first met {target['metric']} {sign} "
        f"{target[goal]:g}{unit} (looked at every {target['evaluate_every']:,} samples): "
        f"{seconds}; samples used by all workers; payload of all ranks. Mark and line: "
        f"{text.spreads(table['seconds'])}. Open mark at the right edge: k of n runs did not "
        "arrive within the budget, and a median of which half did not is not a number."
    )


def said_of_colours(slowed: Sequence[str]) -> str:
    """What the colours tell apart; nothing where there is one."""
    return f"Colour: {'; '.join(map(labels.slowed, slowed))}. " if len(slowed) > 1 else ""


def setting(table: pd.DataFrame, material: Material) -> str:
    """The end of a caption: workload, workers, in virtual time the world, then the provenance."""
    first = table.iloc[0]
    world = ""

    if material.clock == "virtual":
        links = "free links" if first["link"] == "free" else f"links of {first['link']}"
        world = f", compute times {first['spread']}, {links}"

        if (table["hosts"] > 1).any():
            world += (
                "; where hosts are named, the ranks of one exchange in no time and their "
                "bytes cross no link"
            )

    said = f"{first['workload']}, {labels.workers(int(first['replicas']))}{world}."
    return f"{said} {material.provenance(list(table['cell_id']))}"


def by_straggler(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each straggler, those without one first."""
    return [(who, table[table["straggler"] == who]) for who in stragglers(table)]
