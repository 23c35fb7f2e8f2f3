"""Bytes per step: predicted, payload and wire side by side, and the busiest port."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from benchsuite.analysis.statistics import Summary
from benchsuite.report import text
from benchsuite.report.drawing.canvas import Drawing, Margins, grid
from benchsuite.report.drawing.style import INK, SOFT, WIDE_IN
from benchsuite.report.kinds import Kind
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec
from benchsuite.report.words import labels

KIND = Kind(title="How many bytes?", clock="wall", place=30)

MOST_LABEL_IN = 2.2  # names may take of half the width, so that an inch is left for the bars


def draw(spec: FigureSpec, material: Material) -> list[Drawing]:
    """Two panels: bytes of all ranks, and of the busiest port; rows grouped by workers."""
    table = material.of(material.traffic, spec).sort_values(["replicas", "order"], kind="stable")
    if table.empty:
        return []
    places, headings = _rows(table)
    height = 0.155 * (max(places) + 1.6)
    legend = [
        (INK, "black tick: predicted"),
        ("#6b7280", "dark: payload"),
        ("#c9ccd1", "light: wire"),
    ]
    called = [labels.short(series) for series in table["series"]]
    room = 0.056 * max(map(len, called)) + 0.1
    margins = Margins(left=min(max(0.92, room), MOST_LABEL_IN), right=0.24, top=0.24)
    layout = grid([height], 2, width=WIDE_IN, legend=legend, margins=margins)
    total, port = layout.axes[0]

    for place, row in zip(places, table.to_dict("records"), strict=True):
        color = material.looks[row["series"]].color
        _bytes_row(total, place, row, color)
        _bar(port, place, row["busiest_port_bytes_per_step"], color, 0.6)

    for ax, title in (
        (total, "bytes per step, all ranks"),
        (port, "bytes per step through the busiest port"),
    ):
        ax.set_title(title, loc="left")
        _frame(ax, places, called, headings)

    derived = int((table["payload_source"] == "derived").sum())
    caption = (
        "Dark: payload; light: what the kernel counted on the wire, with the ratio wire / (payload "
        "+ control); black tick: predicted from the cell alone. An asynchronous update is counted "
        f"as a step: it is 1/N of a synchronous one. {derived} of {len(table)} rows are derived "
        "(library collectives): their payload is a formula, so only the wire checks it. Busiest "
        f"port: the most one rank sends, or receives. {material.provenance(list(table['cell_id']))}"
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
            alt="predicted, payload and wire bytes per step for every strategy and number of "
            "workers",
        )
    ]


def _frame(
    ax: Axes,
    places: Sequence[float],
    called: Sequence[str],
    headings: Sequence[tuple[float, str]],
) -> None:
    """Names the rows and sets the axes of one panel."""
    ax.set_yticks(places, called)

    for place, heading in headings:
        ax.text(
            -0.01,
            place,
            heading,
            transform=ax.get_yaxis_transform(),
            ha="right",
            va="center",
            fontweight="bold",
        )

    ax.set_ylim(max(places) + 0.8, -1.4)
    ax.set_xlim(left=0)
    ax.margins(x=0.12)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text.si(value).replace("0 B", "0")))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    ax.set_axisbelow(True)


def _rows(table: pd.DataFrame) -> tuple[list[float], list[tuple[float, str]]]:
    """The y of every row, with a gap and a heading before each number of workers."""
    places: list[float] = []
    headings = []
    at = -1.0
    before = None

    for count, slowed in zip(table["replicas"], table["straggler"], strict=True):
        heading = labels.workers(count) + (f", {slowed}" if slowed else "")
        at += 1.0

        if heading != before:
            at += 0.5 if before is None else 1.3
            headings.append((at - 1.0, heading))
            before = heading

        places.append(at)

    return places, headings


def _bytes_row(ax: Axes, place: float, row: Mapping[Hashable, Any], color: str) -> None:
    payload: Summary = row["payload_bytes_per_step"]
    wire: Summary = row["wire_bytes_per_step"]
    predicted: Summary = row["predicted_bytes_per_step"]
    ratio: Summary = row["wire_ratio"]
    _bar(ax, place - 0.19, payload, color, 0.36)
    _bar(ax, place + 0.19, wire, color, 0.36, alpha=0.4)
    if predicted.n and predicted.center > 0:
        ax.vlines(predicted.center, place - 0.44, place + 0.06, color=INK, linewidth=1.3)
    end = max((s.high for s in (payload, wire) if s.n), default=0.0)

    if payload.n and payload.center == 0:
        phrase = "0"
    elif ratio.n:
        phrase = f"× {ratio.center:.3g}"
    else:
        phrase = "wire not counted"

    ax.annotate(
        phrase,
        (end, place),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        color=SOFT,
        fontsize=6.5,
    )


def _bar(
    ax: Axes, place: float, summary: Summary, color: str, height: float, alpha: float = 1.0
) -> None:
    if summary.n and not math.isnan(summary.center):
        ax.barh(place, summary.center, height=height, color=color, alpha=alpha, linewidth=0)
