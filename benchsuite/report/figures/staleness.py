"""How stale gradients were when they were applied: a histogram per cell."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from benchsuite.report.drawing.canvas import Drawing, Margins, grid
from benchsuite.report.drawing.style import INK, NARROW_IN, WIDE_IN
from benchsuite.report.kinds import Kind
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec
from benchsuite.report.words import labels

KIND = Kind(title="How stale are the gradients?", clock="wall", place=40)


def draw(spec: FigureSpec, material: Material) -> list[Drawing]:
    """Share of updates by staleness, one panel per cell."""
    table = material.of(material.staleness, spec)
    names = material.of(material.names, spec)
    names = names[names["cell_id"].isin(set(table["cell_id"]))].sort_values(
        ["straggler", "replicas"], kind="stable"
    )
    if names.empty:
        return []
    columns = min(len(names), 4)
    legend = [material.looks[series] for series in dict.fromkeys(names["series"])]
    several = names["series"].nunique() > 1
    titles = [_panel_title(name, several=several) for name in names.to_dict("records")]
    width = NARROW_IN if columns < 3 and not several else WIDE_IN
    layout = grid(
        [1.15] * math.ceil(len(names) / columns),
        columns,
        width=width,
        legend=legend,
        margins=Margins(top=0.1 + 0.15 * max(title.count("\n") + 1 for title in titles)),
    )
    flat = [ax for line in layout.axes for ax in line]
    boxes = [box for line in layout.cells for box in line]
    for ax in flat[len(names) :]:
        ax.set_visible(False)

    for ax, name, title in zip(flat, names.to_dict("records"), titles, strict=False):
        rows = table[table["cell_id"] == name["cell_id"]]
        color = material.looks[name["series"]].color
        ax.bar(rows["staleness"], rows["center"], color=color, width=0.8, linewidth=0)
        ax.vlines(rows["staleness"], rows["low"], rows["high"], color=INK, linewidth=0.8)
        ax.set_title(title, loc="left", fontweight="bold")
        ax.set_ylim(0, 1)
        top = max(3, int(rows["staleness"].max()))
        ax.set_xlim(-0.6, top + 0.6)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        ax.set_xlabel("staleness (versions)")
        ax.grid(axis="y")
        ax.set_axisbelow(True)

    caption = (
        "Share of the updates of a run by staleness = version at the update minus version that the "
        "gradient was computed with. Bar: median over the runs; line: range. "
        f"{material.provenance(list(names['cell_id']))}"
    )
    return [
        Drawing(
            spec.name,
            layout.figure,
            caption,
            list(names["cell_id"]),
            legend,
            layout.whole,
            boxes[: len(names)],
            alt="histogram of the staleness of the applied gradients",
        )
    ]


def _panel_title(name: Mapping[Hashable, Any], *, several: bool) -> str:
    lines = [labels.short(name["series"])] if several else []
    lines.append(labels.workers(name["replicas"]))
    if name["straggler"]:
        lines.append(f"{name['straggler']} slower")
    return "\n".join(lines)
