"""What the target takes: seconds, samples and bytes, a row per strategy."""

from __future__ import annotations

import pandas as pd

from benchsuite.report.drawing import rows
from benchsuite.report.drawing.canvas import Drawing
from benchsuite.report.drawing.rows import Column, Mark
from benchsuite.report.drawing.strategy_rows import (
    AXES,
    listed,
    said_of_arrivals,
    said_of_colours,
    setting,
    stragglers,
    worlds,
)
from benchsuite.report.drawing.style import levels
from benchsuite.report.kinds import Kind
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec
from benchsuite.report.words import labels

KIND = Kind(
    title="What does the target take?",
    clock="wall",
    keys={
        "x": ("seconds", "samples", "bytes"),
        "goal": ("target", "easy", "hard"),
    },
    place=60,
)


def draw(spec: FigureSpec, material: Material) -> list[Drawing]:
    """One column per quantity; the colours tell who is slowed."""
    virtual = material.clock == "virtual"
    drawings = []

    for suffix, table in worlds(spec, material):
        slowed = stragglers(table)
        columns = []

        for x in spec.values["x"]:
            title, axis, unit = AXES[x]
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
            f"{said_of_arrivals(spec, table, material)} "
            f"{said_of_colours(slowed)}{_said_of_flags(table, virtual=virtual)}"
            f"{setting(table, material)}"
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


def _said_of_flags(table: pd.DataFrame, *, virtual: bool) -> str:
    count = int(table["flagged"].sum())
    if not count or virtual:
        return ""
    return (
        f"Hollow ({count} of {len(table)} cells): oversubscribed or contended, their seconds are "
        "not compared; samples and bytes are counted all the same. "
    )
