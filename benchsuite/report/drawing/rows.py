"""A row per strategy, a column per quantity: the picture for many strategies.

Inside a row stands one mark per level (who is slowed, which tuning). A mark is a median and its
line a range or an interval. What was never reached stands open at the right edge with `k of n`; a
line that is dashed up to there says that some runs did not arrive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from benchsuite.analysis.statistics import Summary
from benchsuite.report import text
from benchsuite.report.drawing.canvas import Grid, Margins, grid
from benchsuite.report.drawing.style import GRID, INK, SOFT, WIDE_IN, Look

# height of a row, and what each level adds
ROW_IN = 0.11
LEVEL_IN = 0.05
LEFT_IN = 0.08
TEXT_IN = 0.36  # room for texts at the end of rows
# width of the strip for misses, and where in it their marks stand
EDGE_IN = 0.5
AT_IN = 0.11
CHARACTER_IN = 0.052
SMALL = 6.3


@dataclass(frozen=True)
class Row:
    """One strategy. A thin line is drawn where `group` changes from one row to the next."""

    key: str
    label: str
    group: str = ""


@dataclass(frozen=True)
class Mark:
    """The value of a row at one level; its mark is hollow where a flag forbids a claim."""

    summary: Summary
    hollow: bool = False


@dataclass(frozen=True)
class Column:
    """One quantity: its marks by (row, level), its scale, and texts at the end of its rows."""

    title: str
    axis: str
    marks: Mapping[tuple[str, str], Mark]
    unit: str = ""
    log: bool = True
    joined: bool = False  # a line from level to level within a row
    texts: Mapping[str, str] = field(default_factory=dict)


def draw(
    rows: Sequence[Row],
    levels: Mapping[str, Look],
    columns: Sequence[Column],
    *,
    shared: bool = False,
) -> Grid:
    """Draws all columns side by side on one grid.

    `levels`: key -> how it is drawn, in the order in which they stand below each other in a row.
    `shared`: all columns are of one quantity and have one scale.
    """
    labels = 0.1 + CHARACTER_IN * max(len(row.label) for row in rows)
    height = (ROW_IN + LEVEL_IN * len(levels)) * len(rows)
    misses = any(mark.summary.misses for column in columns for mark in column.marks.values())
    texts = any(column.texts for column in columns)
    margins = Margins(
        left=LEFT_IN,
        right=0.06 + (EDGE_IN if misses else 0.0) + (TEXT_IN if texts else 0.0),
        top=0.5 if len(rows) > 12 else 0.36,
        bottom=0.42,
    )
    legend = legend_of(levels)
    layout = grid(
        [height], len(columns), width=WIDE_IN, legend=legend, margins=margins, labels=labels
    )
    inches = (WIDE_IN - labels) / len(columns) - margins.left - margins.right

    for place, (ax, column) in enumerate(zip(layout.axes[0], columns, strict=True)):
        _frame(ax, rows, column, first=place == 0)
        _scale(ax, columns if shared else [column])
        if misses:
            _edge(ax, inches)

        for at, row in enumerate(rows):
            _row(ax, at, row, levels, column, inches=inches)
            if row.key in column.texts:
                ax.text(
                    1 + (0.06 + (EDGE_IN if misses else 0.0)) / inches,
                    at,
                    column.texts[row.key],
                    va="center",
                    transform=ax.get_yaxis_transform(),
                    color=INK,
                    fontsize=SMALL,
                )

    return layout


def _frame(ax: Axes, rows: Sequence[Row], column: Column, *, first: bool) -> None:
    ax.set_title(column.title, loc="left", fontweight="bold")
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_yticks(range(len(rows)), [row.label if first else "" for row in rows])
    ax.tick_params(
        axis="y", length=0, pad=72 * LEFT_IN + 2
    )  # names end where a panel is cut for a phone
    ax.spines["left"].set_visible(False)

    for at in range(1, len(rows)):
        if rows[at].group != rows[at - 1].group:
            ax.axhline(at - 0.5, color=SOFT, linewidth=0.5, alpha=0.6, zorder=0.5)
        else:
            ax.axhline(at - 0.5, color=GRID, linewidth=0.4, zorder=0.5)

    ax.grid(axis="x")
    ax.set_axisbelow(True)
    if len(rows) > 12:
        ax.tick_params(axis="x", labeltop=True)


def legend_of(levels: Mapping[str, Look]) -> list[Look]:
    """The legend of these levels; empty where there is only one."""
    return list(levels.values()) if len(levels) > 1 else []


def _scale(ax: Axes, columns: Sequence[Column]) -> None:
    """Sets limits around all finite values, and few ticks, since panels are narrow.

    A unit and its decimal prefix stand at the axis, not at each tick.
    """
    column = columns[0]
    ends = [
        end
        for each in columns
        for mark in each.marks.values()
        for end in (mark.summary.low, mark.summary.center, mark.summary.high)
        if math.isfinite(end) and (end > 0 or not column.log)
    ]
    low, high = (min(ends), max(ends)) if ends else (1.0, 1.0)

    if column.log:
        # Room beside the outermost marks, as a factor, since the axis is logarithmic.
        room = max((high / low) ** 0.06, 1.06)
        ax.set_xscale("log")
        ax.set_xlim(low / room, high * room)
        ax.xaxis.set_minor_locator(NullLocator())
        # A narrow panel bears about four ticks: the fewer decades, the finer the steps in each.
        decades = math.log10(high / low) + 2 * math.log10(room)
        steps = (1.0,) if decades > 2.2 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
        ax.xaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=12))
        if decades < 0.35:
            ax.xaxis.set_major_locator(FixedLocator(list(MaxNLocator(3).tick_values(low, high))))
    else:
        ax.set_xlim(0, high * 1.06)
        ax.xaxis.set_major_locator(MaxNLocator(3))

    if not ends:
        ax.xaxis.set_major_locator(NullLocator())
    factor, prefix = text.prefix(high) if column.unit else (1.0, "")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text.tick(value / factor)))
    ax.set_xlabel(
        f"{prefix}{column.unit}{', ' if column.unit and column.axis else ''}{column.axis}"
    )


def _edge(ax: Axes, inches: float) -> None:
    """Shades the strip at the right edge in which marks of misses stand."""
    width = (EDGE_IN - 0.04) / inches
    patch = Rectangle(
        (1 + 0.02 / inches, 0),
        width,
        1,
        transform=ax.transAxes,
        color=SOFT,
        alpha=0.09,
        linewidth=0,
    )
    patch.set_clip_on(False)
    ax.add_patch(patch)
    ax.text(
        1 + (EDGE_IN / 2) / inches,
        0.0,
        "> budget",
        transform=ax.transAxes,
        ha="center",
        va="top",
        color=SOFT,
        fontsize=SMALL,
    )


def _row(
    ax: Axes, at: int, row: Row, levels: Mapping[str, Look], column: Column, *, inches: float
) -> None:
    # Rows are 1 apart, so inches become shares of a row; 1.35 spreads the marks within it.
    step = LEVEL_IN / (ROW_IN + LEVEL_IN * len(levels)) * 1.35
    places = {
        level: at + step * (position - (len(levels) - 1) / 2)
        for position, level in enumerate(levels)
    }
    drawn = {
        level: column.marks[row.key, level] for level in levels if (row.key, level) in column.marks
    }
    if column.joined:
        _join(ax, [(mark.summary.center, places[level]) for level, mark in drawn.items()])

    for level, mark in drawn.items():
        if mark.summary.n:
            _mark(ax, places[level], mark, levels[level], inches=inches)

    _count_misses(
        ax, at, places, {level: mark.summary for level, mark in drawn.items()}, inches=inches
    )


def _join(ax: Axes, points: Sequence[tuple[float, float]]) -> None:
    if len(points) > 1 and all(math.isfinite(x) for x, _ in points):
        xs, ys = zip(*points, strict=True)
        ax.plot(xs, ys, color=SOFT, linewidth=0.8, zorder=1.8, gid="joined")


def _mark(ax: Axes, y: float, mark: Mark, look: Look, *, inches: float) -> None:
    summary = mark.summary
    plain: dict[str, Any] = {
        "marker": look.marker,
        "linestyle": "none",
        "color": look.color,
        "markersize": 3.6,
    }
    _spread(ax, y, summary, plain, inches=inches)
    if not math.isfinite(summary.center):
        return

    if summary.center <= 0 and column_is_log(ax):
        ax.plot(
            [0],
            [y],
            transform=ax.get_yaxis_transform(),
            clip_on=False,
            gid="zero",
            zorder=3,
            **plain,
        )
        ax.annotate(
            "0",
            (0, y),
            xycoords=ax.get_yaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=look.color,
            fontsize=5.2,
        )
        return

    face = "white" if mark.hollow else look.color
    ax.plot(
        [summary.center],
        [y],
        markerfacecolor=face,
        gid="hollow" if mark.hollow else "filled",
        zorder=3,
        **plain,
    )


def _spread(
    ax: Axes, y: float, summary: Summary, plain: Mapping[str, Any], *, inches: float
) -> None:
    """The line from the lowest to the highest run.

    Where some runs missed, it is dashed up to the edge, and an open mark stands beyond.
    """
    color = plain["color"]

    if not summary.misses:
        if summary.high > summary.low:
            ax.hlines(y, summary.low, summary.high, color=color, linewidth=0.9, zorder=2)
        return

    ax.plot(
        [1 + AT_IN / inches],
        [y],
        transform=ax.get_yaxis_transform(),
        clip_on=False,
        markerfacecolor="white",
        gid="missed",
        zorder=3,
        **plain,
    )

    if math.isfinite(summary.low):
        edge = ax.get_xlim()[1]
        dashes = (0, (2, 1.2))
        ax.hlines(y, summary.low, edge, color=color, linewidth=0.9, linestyle=dashes, zorder=2)


def column_is_log(ax: Axes) -> bool:
    """Whether the axis is logarithmic, so that nothing can stand at 0."""
    return ax.get_xscale() == "log"


def _count_misses(
    ax: Axes, at: int, places: Mapping[str, float], drawn: Mapping[str, Summary], *, inches: float
) -> None:
    """Writes `k of n` beside the open marks, once for a row where all its levels agree."""
    counts = {level: f"{s.misses} of {s.n}" for level, s in drawn.items() if s.misses}
    style: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center", "color": INK}
    x = 1 + (AT_IN + 0.06) / inches

    if len(set(counts.values())) == 1 and len(counts) in (1, len(places)):
        y = at if len(counts) > 1 else places[next(iter(counts))]
        ax.text(x, y, next(iter(counts.values())), fontsize=SMALL, **style)
        return

    for level, phrase in counts.items():
        ax.text(x, places[level], phrase, fontsize=5.2, **style)
