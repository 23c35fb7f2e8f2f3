"""Quantities against the number of workers in virtual time, one panel per compute time and link."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from benchsuite.report.drawing.canvas import Drawing, Margins, grid
from benchsuite.report.drawing.style import SOFT, WIDE_IN
from benchsuite.report.drawing.worker_lines import (
    MISSED,
    QUANTITIES,
    cells_of,
    draw_line,
    said_of_worlds,
    share_limits,
    style_axes,
)
from benchsuite.report.kinds import Kind
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec
from benchsuite.report.words import labels

KIND = Kind(
    title="And with more workers? In virtual time",
    clock="virtual",
    keys={
        "y": ("staleness", "waiting", "samples_per_s", "seconds_to_target", "samples_to_target"),
        "columns": ("spread", "link", ""),
        "rows": ("link", "spread", ""),
    },
    place=100,
)


_COLUMNS = {
    "samples_per_s": "virtual_samples_per_s",
    "seconds_to_target": "virtual_seconds_to_target",
}


@dataclass(frozen=True)
class Panel:
    """What one panel shows: these cells, this quantity."""

    table: pd.DataFrame
    y: str
    title: str


def draw(spec: FigureSpec, material: Material) -> list[Drawing]:
    """One drawing per workload and quantity, its panels by compute times and links.

    Where a plan asks to tell neither apart, one drawing has the quantities side by side.
    """
    table = cells_of(spec, material)
    drawings = []
    workloads = list(dict.fromkeys(table["workload"]))
    across = spec.values["columns"][0]
    down = spec.values["rows"][0]

    for workload in workloads:
        suffix = f"_{workload.replace('/', '_')}" if len(workloads) > 1 else ""
        mine = table[table["workload"] == workload]
        drawn = [
            y for y in spec.values["y"] if (mine[_COLUMNS.get(y, y)].map(lambda s: s.n) > 0).any()
        ]

        if not across and not down:
            if drawn:
                panels = [[Panel(_with(mine, y), y, QUANTITIES[y].label) for y in drawn]]
                drawings.append(_drawing(f"{spec.name}{suffix}", panels, material))
            continue

        for y in drawn:
            name = spec.name if len(spec.values["y"]) == 1 else f"{spec.name}_{y}"
            drawings.append(
                _drawing(f"{name}{suffix}", _grid(_with(mine, y), y, across, down), material)
            )

    return drawings


def _with(table: pd.DataFrame, y: str) -> pd.DataFrame:
    """The rows in which this quantity has a value."""
    return table[table[_COLUMNS.get(y, y)].map(lambda s: s.n) > 0]


def _grid(table: pd.DataFrame, y: str, across: str, down: str) -> list[list[Panel]]:
    """One panel per value of `across` and `down` ("" = not told apart)."""

    def parts(of: pd.DataFrame, key: str) -> list[tuple[str, pd.DataFrame]]:
        return (
            [(str(value), of[of[key] == value]) for value in dict.fromkeys(table[key])]
            if key
            else [("", of)]
        )

    return [
        [
            Panel(inside, y, "\n".join(filter(None, (row, column))))
            for column, inside in parts(line, across)
        ]
        for row, line in parts(table, down)
    ]


def _drawing(name: str, panels: Sequence[Sequence[Panel]], material: Material) -> Drawing:
    table = pd.concat([panel.table for line in panels for panel in line]).drop_duplicates("cell_id")
    legend = [material.looks[series] for series in dict.fromkeys(table["series"])]
    arrives = any(panel.y.endswith("to_target") for line in panels for panel in line)
    lines = max(panel.title.count("\n") for line in panels for panel in line)
    margins = Margins(
        left=0.56,
        right=0.12,
        top=(0.4 if arrives else 0.22) + 0.13 * lines,
        bottom=0.36,
        between=0.28,
    )
    layout = grid(
        [1.25 if len(panels) > 1 else 1.5] * len(panels),
        len(panels[0]),
        width=WIDE_IN,
        legend=legend,
        margins=margins,
    )
    counts = sorted(set(table["replicas"]))
    quantities = list(dict.fromkeys(panel.y for line in panels for panel in line))

    for r, line in enumerate(panels):
        for c, panel in enumerate(line):
            ax = layout.axes[r][c]
            _theory(ax, panel.y, panel.table, counts)
            if _lines(ax, panel.table, material, _COLUMNS.get(panel.y, panel.y)):
                _strip(ax)
            ax.set_title(panel.title, loc="left", pad=16 if arrives else None)
            style_axes(
                ax,
                panel.y,
                counts,
                first=c == 0 and len(quantities) == 1,
                last=r == len(panels) - 1,
            )

    for y in quantities:
        axes = [
            layout.axes[r][c]
            for r, line in enumerate(panels)
            for c, panel in enumerate(line)
            if panel.y == y
        ]
        share_limits(axes, y)

    boxes = [box for line in layout.cells for box in line]
    return Drawing(
        name,
        layout.figure,
        _caption(table, material, quantities),
        list(table["cell_id"]),
        legend,
        layout.whole,
        boxes,
        alt=f"{', '.join(QUANTITIES[y].label for y in quantities)} against the number of workers, "
        "in virtual time",
    )


def _caption(table: pd.DataFrame, material: Material, quantities: Sequence[str]) -> str:
    meanings = "; ".join(f"{QUANTITIES[y].label}: {QUANTITIES[y].meaning}" for y in quantities)
    arrives = any(y.endswith("to_target") for y in quantities)
    edge = (
        " A mark above the panel: the median run did not arrive within the budget; a bar up to "
        "there: some did not."
        if arrives
        else ""
    )
    goal = ""

    if arrives:
        target = material.in_virtual_time.target(str(table["workload"].iloc[0]))
        if target:
            sign = "≥" if target["direction"] == "max" else "≤"
            unit = str(target.get("unit") or "")
            goal = f" Target: {target['metric']} {sign} {target['target']:g}{unit}."

    timing = " Times only: no gradient was computed." if set(table["gradients"]) == {"none"} else ""
    return (
        f"{meanings[0].upper()}{meanings[1:]}. Line: median, bar: range or "
        f"interval.{edge}{goal}{_by_size(table)}{timing} Compute times and links: "
        f"{said_of_worlds(table)}. {material.in_virtual_time.provenance(list(table['cell_id']))}"
    )


def _by_size(table: pd.DataFrame) -> str:
    """Names options that go with the number of workers.

    E.g. `k sync: backup_workers = 1, 2 with 4, 16 workers.`
    """
    said = []

    for series, rows in table[table["by_size"] != ""].groupby("series", sort=False):
        pairs = sorted(
            {(int(n), str(text)) for n, text in zip(rows["replicas"], rows["by_size"], strict=True)}
        )
        name = pairs[0][1].partition("=")[0]
        values = ", ".join(text.partition("=")[2] for _, text in pairs)
        sizes = ", ".join(str(n) for n, _ in pairs)
        said.append(f" {labels.label(str(series))}: {name} = {values} with {sizes} workers.")

    return "".join(said)


def _lines(ax: Axes, table: pd.DataFrame, material: Material, column: str) -> bool:
    """Draws one line per series and returns whether a median was never reached."""
    missed = False
    series = list(dict.fromkeys(table["series"]))

    for position, name in enumerate(series):
        points = table[table["series"] == name].sort_values("replicas")
        shift = 2 ** (
            0.09 * (position - (len(series) - 1) / 2)
        )  # bars of several series beside each other
        missed |= draw_line(ax, points, column, material.looks[name], shift)

    return missed


def _theory(ax: Axes, y: str, table: pd.DataFrame, counts: Sequence[int]) -> None:
    """Draws what is known in closed form as a dotted line."""
    style: dict[str, Any] = {
        "color": SOFT,
        "linewidth": 0.9,
        "linestyle": (0, (1, 1.6)),
        "gid": "theory",
    }

    if y == "staleness":
        ax.plot(counts, [n - 1 for n in counts], **style)
    # The slowest of N exponential times takes H_N = 1 + 1/2 + .. + 1/N means, a gradient one.
    elif y == "waiting" and set(table["spread"]) == {"exponential"}:
        ax.plot(
            counts, [1 - 1 / math.fsum(1 / k for k in range(1, n + 1)) for n in counts], **style
        )


def _strip(ax: Axes) -> None:
    """Shades the strip above a panel in which medians stand that were never reached."""
    strip = Rectangle(
        (0, 1.02),
        1,
        2 * (MISSED - 1.02),
        transform=ax.transAxes,
        color=SOFT,
        alpha=0.1,
        linewidth=0,
    )
    strip.set_clip_on(False)
    ax.add_patch(strip)
    ax.text(
        -0.02,
        MISSED,
        "> budget",
        transform=ax.transAxes,
        va="center",
        ha="right",
        color=SOFT,
        fontsize=6,
    )
