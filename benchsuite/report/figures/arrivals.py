"""Pictures with a row per strategy: `to_target`, `virtual_to_target`, `virtual_tuning`,
`throughput` of one N.

A drawing is of one workload, one number of workers, and under the virtual clock one world of
compute times and links, so a strategy has one cell per slowed worker. Seconds are wall seconds or
virtual ones by kind, never both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from benchsuite.analysis.arrival import TUNED, arrivals
from benchsuite.report.figures import rows
from benchsuite.report.figures.canvas import Drawing
from benchsuite.report.figures.rows import Column, Mark, Row
from benchsuite.report.figures.style import levels
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec
from benchsuite.report.words import labels
from benchsuite.report.words.sentences import names

WORLD = ("workload", "replicas", "spread", "link")
_AXES = {  # quantity -> title of its column, axis, unit
    "seconds": ("time to target", "seconds", ""),
    "samples": ("samples to target", "samples", ""),
    "bytes": ("bytes to target", "all ranks", "B"),
}


def worlds(spec: FigureSpec, material: Material) -> Iterator[tuple[str, pd.DataFrame]]:
    """Suffix of a file name, and `arrivals` of the cells that may be compared; `material` is of one
    clock.

    Where all are tuned, their series do not say so.
    """
    goal = spec.values.get("goal", ("target",))[0]
    wanted = material.of(material.names, spec)
    table = arrivals(material.runs, wanted, goal=goal).sort_values("order", kind="stable")
    if set(table["tuning"]) == {TUNED}:
        table["series"] = table["base"]
    groups = [group for _, group in table.groupby(list(WORLD), sort=False)]
    for position, group in enumerate(groups):
        yield (f"_{position + 1}" if len(groups) > 1 else ""), group


def to_target(spec: FigureSpec, material: Material) -> list[Drawing]:
    """Columns: seconds, samples, bytes; colours: who is slowed."""
    virtual = spec.kind.startswith("virtual")
    material = material.in_virtual_time if virtual else material
    drawings = []
    for suffix, table in worlds(spec, material):
        slowed = stragglers(table)
        columns = []
        for x in spec.values["x"]:
            title, axis, unit = _AXES[x]
            axis = f"virtual {axis}" if virtual and x == "seconds" else axis
            marks = {
                (str(row["series"]), str(row["straggler"])): Mark(
                    row[x], hollow=row["flagged"] and x == "seconds"
                )
                for row in table.to_dict("records")
            }
            columns.append(Column(title, axis, marks, unit=unit))
        looks = levels([labels.slowed(text) for text in slowed])
        drawn = dict(zip(slowed, looks, strict=True))
        layout = rows.draw(listed(table, material), drawn, columns)
        caption = (
            f"{_what(spec, table, material)} "
            f"{_slow(slowed)}{_flags(table, spec)}{setting(table, material)}"
        )
        drawings.append(
            Drawing(
                f"{spec.name}{suffix}",
                layout.figure,
                caption,
                list(table["cell_id"]),
                rows.legend_of(drawn),
                layout.whole,
                layout.columns,
                alt=f"{', '.join(spec.values['x'])} to target of every strategy",
                labels=layout.labels,
            )
        )
    return drawings


def tuning(spec: FigureSpec, material: Material) -> list[Drawing]:
    """The recipe's learning rate and that which trials chose for the strategy, one column per
    slowed worker."""
    material = material.in_virtual_time
    y = spec.values["y"][0]
    drawings = []
    for suffix, table in worlds(spec, material):
        pairs = both(table)
        if pairs.empty:
            continue
        columns = []
        for slowed in stragglers(pairs):
            mine = pairs[pairs["straggler"] == slowed].to_dict("records")
            marks = {(str(row["base"]), str(row["tuning"])): Mark(row[y]) for row in mine}
            _, axis, unit = _AXES[y]
            columns.append(
                Column(
                    labels.slowed(slowed),
                    f"virtual {axis}" if y == "seconds" else axis,
                    marks,
                    unit=unit,
                    joined=True,
                    texts={
                        str(row["base"]): factors(row) for row in mine if row["tuning"] == TUNED
                    },
                )
            )
        looks = levels(
            [
                "the recipe's learning rate",
                "the best of those tried for the strategy (right: its factor)",
            ]
        )
        drawn = dict(zip(("same", TUNED), looks, strict=True))
        layout = rows.draw(
            listed(pairs[pairs["tuning"] != TUNED], material), drawn, columns, shared=True
        )
        caption = (
            f"{_what(spec, pairs, material)} Every strategy had the same trials: each factor of "
            "the recipe's learning "
            "rate once, with a seed of its own; the fewest samples to the target chose. "
            f"{setting(pairs, material)}"
        )
        drawings.append(
            Drawing(
                f"{spec.name}{suffix}",
                layout.figure,
                caption,
                list(pairs["cell_id"]),
                looks,
                layout.whole,
                layout.columns,
                alt="what a learning rate of its own changes for every strategy",
                labels=layout.labels,
            )
        )
    return drawings


def rates(spec: FigureSpec, table: pd.DataFrame, material: Material) -> Drawing:
    """Throughput and CPU time per sample of one number of workers; `table`: `scaling.scaling`."""
    slowed = sorted(dict.fromkeys(map(str, table["straggler"])))
    looks = levels([labels.slowed(text) for text in slowed])
    columns = []
    for title, column, scale, axis, claims in (
        ("throughput", "samples_per_s", 1.0, "samples per second, all workers", True),
        ("CPU time", "cpu_s_per_sample", 1e3, "ms per sample, all ranks", False),
    ):
        marks = {
            (str(row["series"]), str(row["straggler"])): Mark(
                row[column].times(scale),
                hollow=claims and bool(row["oversubscribed"] or row["contended"]),
            )
            for row in table.to_dict("records")
        }
        columns.append(Column(title, axis, marks, log=False))
    drawn = dict(zip(slowed, looks, strict=True))
    layout = rows.draw(listed(table, material), drawn, columns)
    flagged = int((table["oversubscribed"] | table["contended"]).sum())
    hollow = (
        f"Hollow ({flagged} of {len(table)} cells): oversubscribed or contended, their samples/s "
        "rank nothing. "
        if flagged
        else ""
    )
    caption = (
        "Left: total samples over total wall time after warm-up. Right: CPU time of all ranks, "
        "servers included, per "
        "sample. Mark and line: "
        f"{labels.spreads(mark.summary for each in columns for mark in each.marks.values())}. "
        f"{_slow(slowed)}{hollow}"
        f"{labels.workers(int(table['replicas'].iloc[0]))}. "
        f"{material.provenance(list(table['cell_id']))}"
    )
    return Drawing(
        spec.name,
        layout.figure,
        caption,
        list(table["cell_id"]),
        rows.legend_of(drawn),
        layout.whole,
        layout.columns,
        alt="throughput and CPU time per sample of every strategy",
        labels=layout.labels,
    )


def both(table: pd.DataFrame) -> pd.DataFrame:
    """The cells whose strategy and straggler were run with either tuning."""
    kinds = table.groupby(["base", "straggler"])["tuning"].transform("nunique")
    return table[kinds == 2]


def factors(row: Mapping[Any, Any]) -> str:
    """`x2`; empty where no trial ended."""
    return ", ".join(f"×{factor:g}" for factor in row["lr_factors"])


def stragglers(table: pd.DataFrame) -> list[str]:
    """Who is slowed, nobody first, then by factor."""
    pairs = {
        (float(s), str(text)) for s, text in zip(table["slowdown"], table["straggler"], strict=True)
    }
    return [text for _, text in sorted(pairs)]


def listed(table: pd.DataFrame, material: Material) -> list[Row]:
    """One row per series in the plan's order, those of a sync together."""
    name = names(material, short=True)
    groups: dict[str, list[Row]] = {}
    for one in dict.fromkeys(map(str, table["series"])):
        sync = one.partition("/")[0]
        groups.setdefault(sync, []).append(Row(one, name(one), sync))
    return [row for group in groups.values() for row in group]


def _what(spec: FigureSpec, table: pd.DataFrame, material: Material) -> str:
    goal = spec.values.get("goal", ("target",))[0]
    target = material.target(str(table["workload"].iloc[0]))
    seconds = (
        "virtual seconds" if material.clock == "virtual" else "wall seconds, evaluation excluded"
    )
    sign = "≥" if target["direction"] == "max" else "≤"
    unit = f" {target['unit']}" if target.get("unit") else ""
    return (
        f"What it took until an evaluation first met {target['metric']} {sign} "
        f"{target[goal]:g}{unit} (looked at every "
        f"{target['evaluate_every']:,} samples): {seconds}; samples used by all workers; payload "
        "of all ranks. "
        f"Mark and line: {labels.spreads(table['seconds'])}. Open mark at the right edge: k of n "
        "runs did not arrive "
        "within the budget, and a median of which half did not is not a number."
    )


def _slow(slowed: Sequence[str]) -> str:
    return f"Colour: {'; '.join(map(labels.slowed, slowed))}. " if len(slowed) > 1 else ""


def _flags(table: pd.DataFrame, spec: FigureSpec) -> str:
    count = int(table["flagged"].sum())
    if not count or spec.kind.startswith("virtual"):
        return ""
    return (
        f"Hollow ({count} of {len(table)} cells): oversubscribed or contended, their seconds rank "
        "nothing; samples and "
        "bytes are counted all the same. "
    )


def setting(table: pd.DataFrame, material: Material) -> str:
    """Workers, and in virtual time the world; then where the numbers come from."""
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
    """The cells of each straggler, nobody first."""
    return [(text, table[table["straggler"] == text]) for text in stragglers(table)]
