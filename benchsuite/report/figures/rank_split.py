"""Where each rank's wall time goes: computing, blocked in communication, idle."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from benchsuite.analysis.statistics import Summary
from benchsuite.report import text
from benchsuite.report.drawing.canvas import Drawing, Margins, grid
from benchsuite.report.drawing.style import INK, PARTS, WIDE_IN
from benchsuite.report.kinds import Kind
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec
from benchsuite.report.words import labels

KIND = Kind(title="Where does each rank's time go?", clock="wall", place=50)


def draw(spec: FigureSpec, material: Material) -> list[Drawing]:
    """Share of each rank's wall time by what it did, one panel per cell.

    The title of a panel says what came out of it: samples per second.
    """
    split = material.of(material.split, spec)
    names = material.of(material.scaling, spec)
    names = names[names["cell_id"].isin(set(split["cell_id"]))].sort_values(
        ["straggler", "replicas", "order"], kind="stable"
    )
    if names.empty:
        return []
    columns = min(len(names), 2 if len(names) <= 4 else 3)
    heights = []

    for start in range(0, len(names), columns):
        line = names.iloc[start : start + columns]
        heights.append(0.19 * max(int(size) for size in line["world_size"]) + 0.06)

    used = [PARTS[part] for part in PARTS if split[part].max() > 0.005]
    margins = Margins(left=0.82, right=0.2, top=0.44, bottom=0.28, between=0.28)
    layout = grid(heights, columns, width=WIDE_IN, legend=used, margins=margins)
    flat = [ax for line in layout.axes for ax in line]
    boxes = [box for line in layout.cells for box in line]
    for ax in flat[len(names) :]:
        ax.set_visible(False)

    for place, (ax, name) in enumerate(zip(flat, names.to_dict("records"), strict=False)):
        bars = round((heights[place // columns] - 0.06) / 0.19)
        _ranks(
            ax,
            split[split["cell_id"] == name["cell_id"]].sort_values("rank"),
            bars,
            readable=0.05 * columns,
        )
        _split_title(ax, name)

    return [
        Drawing(
            spec.name,
            layout.figure,
            _caption(split, names, material),
            list(names["cell_id"]),
            used,
            layout.whole,
            boxes[: len(names)],
            alt="share of wall time computing, blocked and idle for every rank",
        )
    ]


def _caption(split: pd.DataFrame, names: pd.DataFrame, material: Material) -> str:
    crowded = (
        " ° oversubscribed: more ranks than cores, its samples/s are not compared."
        if names["oversubscribed"].any()
        else ""
    )
    slowed = (
        " A slowed worker's added wait counts as forward + backward."
        if (names["straggler"] != "").any()
        else ""
    )
    mixed = (
        " Hatched: communication inside the backward pass, not told apart."
        if not split["separable"].all()
        else ""
    )
    return (
        "Share of each rank's wall time (median over the runs). Blocked time on loopback is "
        "CPU-bound waiting for other ranks and for the scheduler, not exposed network "
        f"time.{slowed}{mixed}{crowded} {material.provenance(list(names['cell_id']))}"
    )


def _ranks(ax: Axes, rows: pd.DataFrame, bars: int, *, readable: float) -> None:
    """Draws one bar per rank.

    There is room for `bars`, so that all panels of a line have equally thick ones. `readable` is
    the least share whose percentage is written into the bar.
    """
    called = []

    for place, row in enumerate(rows.to_dict("records")):
        left = 0.0

        for part, (color, _) in PARTS.items():
            share = float(row[part])
            hatch = "////" if part == "compute" and not row["separable"] else None
            ax.barh(
                place,
                share,
                left=left,
                height=0.74,
                color=color,
                linewidth=0,
                hatch=hatch,
                edgecolor="white",
            )

            if share > readable and part in ("compute", "blocked"):
                ink = "white" if part == "compute" else INK
                ax.text(
                    left + share / 2,
                    place,
                    f"{share:.0%}",
                    ha="center",
                    va="center",
                    color=ink,
                    fontsize=6.5,
                )

            left += share

        slowed = f" ({row['straggler']:g}x)" if row["straggler"] != 1 else ""
        called.append(f"{row['role']} {row['rank']}{slowed}")

    ax.set_yticks(range(len(called)), called)
    ax.set_ylim(bars - 0.5, -0.5)
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.5, 1.0], ["0", "50 %", "100 %"])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def _split_title(ax: Axes, name: Mapping[Hashable, Any]) -> None:
    rate: Summary = name["samples_per_s"]
    mark = "°" if name["oversubscribed"] else ""
    slowed = f"{name['straggler']} slower, " if name["straggler"] else ""
    first = f"{labels.short(name['series'])}, {labels.workers(name['replicas'])}"
    ax.set_title(
        f"{first}\n{slowed}{text.number(rate.center)} samples/s{mark}",
        loc="left",
        linespacing=1.35,
    )
