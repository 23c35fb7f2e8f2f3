"""Samples per second and CPU time per sample against the number of workers.

Where a plan has one number of workers only, every strategy has a row instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from benchsuite.analysis.scaling import runs_of_line
from benchsuite.analysis.statistics import Summary
from benchsuite.report import text
from benchsuite.report.drawing import rows
from benchsuite.report.drawing.canvas import Drawing, grid
from benchsuite.report.drawing.rows import Column, Mark
from benchsuite.report.drawing.strategy_rows import listed, said_of_colours
from benchsuite.report.drawing.style import WIDE_IN, Look, levels, marker_face
from benchsuite.report.kinds import Kind
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec
from benchsuite.report.words import labels

KIND = Kind(title="How many samples per second, at how much CPU?", clock="wall", place=20)


def draw(spec: FigureSpec, material: Material) -> list[Drawing]:
    """Samples per second and CPU time per sample against workers.

    A flagged point is hollow and joined to nothing. With one number of workers, a row per strategy.
    """
    table = material.of(material.scaling, spec)
    if table.empty:
        return []
    if table["replicas"].nunique() == 1:
        return [_rates(spec, table.sort_values("order", kind="stable"), material)]
    counts = sorted(set(table["replicas"]))
    series = list(dict.fromkeys(table["series"]))
    legend = [material.looks[name] for name in series]
    layout = grid([1.9], 2, width=WIDE_IN, legend=legend)

    for ax, column, scale, title in (
        (layout.axes[0][0], "samples_per_s", 1.0, "samples per second, all workers together"),
        (layout.axes[0][1], "cpu_s_per_sample", 1e3, "CPU milliseconds per sample, all ranks"),
    ):
        for position, name in enumerate(series):
            shift = 0.5 * ((position + 0.5) / len(series) - 0.5)
            points = table[table["series"] == name].sort_values("replicas")
            _points(
                ax,
                points,
                column,
                scale,
                material.looks[name],
                {n: counts.index(n) + shift for n in counts},
            )

        ax.set_title(title, loc="left")
        _frame(ax, counts)

    flagged = int((table["oversubscribed"] | table["contended"]).sum())
    hollow = (
        f" Hollow ({flagged} of {len(table)} points): oversubscribed or contended, so no line "
        "joins them and no efficiency is claimed."
        if flagged
        else ""
    )
    caption = (
        "Left: total samples over total wall time after warm-up. Right: CPU time of all ranks, "
        "servers included, per sample. Small dots: the runs; large mark: median; bar: range or "
        f"interval.{hollow} {material.provenance(list(table['cell_id']))}"
    )
    return [
        Drawing(
            spec.name,
            layout.figure,
            caption,
            list(table["cell_id"]),
            legend,
            layout.whole,
            layout.columns,
            alt="throughput and CPU time per sample against the number of workers",
        )
    ]


def _frame(ax: Axes, counts: Sequence[int]) -> None:
    """Axes with the numbers of workers as places, equally far apart."""
    ax.set_xticks(range(len(counts)), [str(count) for count in counts])
    ax.set_xlim(-0.5, len(counts) - 0.5)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("workers")
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.grid(axis="y")


def _points(
    ax: Axes,
    points: pd.DataFrame,
    column: str,
    scale: float,
    look: Look,
    place: Mapping[int, float],
) -> None:
    for stretch in runs_of_line(points):
        xs = [place[int(n)] for n in stretch["replicas"]]
        ys = [summary.center * scale for summary in stretch[column]]
        ax.plot(xs, ys, color=look.color, linewidth=1.1, linestyle=look.line, zorder=2)
    for point in points.to_dict("records"):
        summary: Summary = point[column]
        if summary.n == 0 or math.isnan(summary.center):
            continue
        x = place[int(point["replicas"])]
        hollow = point["oversubscribed"] or point["contended"]
        ax.vlines(
            x, summary.low * scale, summary.high * scale, color=look.color, linewidth=1.0, zorder=2
        )

        if summary.n < 10:
            ax.plot(
                [x] * summary.n,
                [p * scale for p in summary.points],
                ".",
                color=look.color,
                markersize=2,
                zorder=2,
            )

        ax.plot(
            [x],
            [summary.center * scale],
            marker=look.marker,
            linestyle="none",
            color=look.color,
            markersize=4.6,
            zorder=3,
            **marker_face(look, hollow=bool(hollow)),
        )


def _rates(spec: FigureSpec, table: pd.DataFrame, material: Material) -> Drawing:
    """The rows of one number of workers; `table` comes from `analysis.scaling.scaling`."""
    slowed = sorted(dict.fromkeys(map(str, table["straggler"])))
    looks = levels([labels.slowed(title) for title in slowed])
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
        "are not compared. "
        if flagged
        else ""
    )
    caption = (
        "Left: total samples over total wall time after warm-up. Right: CPU time of all ranks, "
        "servers included, per sample. Mark and line: "
        f"{text.spreads(mark.summary for each in columns for mark in each.marks.values())}. "
        f"{said_of_colours(slowed)}{hollow}{labels.workers(int(table['replicas'].iloc[0]))}. "
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
