"""What a learning rate of its own changes for every strategy, in virtual time."""

from __future__ import annotations

from benchsuite.analysis.arrival import TUNED
from benchsuite.report.drawing import rows
from benchsuite.report.drawing.canvas import Drawing
from benchsuite.report.drawing.rows import Column, Mark
from benchsuite.report.drawing.strategy_rows import (
    AXES,
    both,
    factors,
    listed,
    said_of_arrivals,
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
    title="What does a learning rate of its own change?",
    clock="virtual",
    keys={"y": ("seconds", "samples", "bytes"), "goal": ("target", "easy", "hard")},
    place=90,
    not_where_all={"tuning": "same"},
)


def draw(spec: FigureSpec, material: Material) -> list[Drawing]:
    """Two marks in a row: with the recipe's learning rate, and with the one that trials chose.

    There is one column of panels per slowed worker.
    """
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
            _, axis, unit = AXES[y]
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
            f"{said_of_arrivals(spec, pairs, material)} Every strategy had the same trials: each "
            "factor of the recipe's learning rate once, with a seed of its own; the fewest samples "
            f"to the target chose. {setting(pairs, material)}"
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
