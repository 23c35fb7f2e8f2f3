"""The kinds that draw bars: bytes per step, staleness, and where each rank's time goes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from benchsuite.analysis.statistics import Summary
from benchsuite.report.figures.canvas import Drawing, Margins, grid
from benchsuite.report.figures.style import INK, NARROW_IN, PARTS, SOFT, WIDE_IN
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec
from benchsuite.report.words import labels as words


def traffic(spec: FigureSpec, material: Material) -> list[Drawing]:
    """Predicted, payload and wire bytes per step side by side, and the busiest port; rows grouped
    by workers."""
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
    labels = [words.short(series) for series in table["series"]]
    margins = Margins(left=max(0.92, 0.056 * max(map(len, labels)) + 0.1), right=0.24, top=0.24)
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
        ax.set_yticks(places, labels)
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
        ax.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: words.si(value).replace("0 B", "0"))
        )
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
        ax.set_axisbelow(True)
    derived = int((table["payload_source"] == "derived").sum())
    caption = (
        "Dark: payload; light: what the kernel counted on the wire, with the ratio wire / (payload "
        "+ control); black "
        "tick: "
        "predicted from the cell alone. An asynchronous update is counted as a step: it is 1/N of "
        "a synchronous one. "
        f"{derived} of {len(table)} rows are derived (library collectives): their payload is a "
        "formula, so only the "
        f"wire "
        "checks it. Busiest port: the most one rank sends, or receives. "
        f"{material.provenance(list(table['cell_id']))}"
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


def _rows(table: pd.DataFrame) -> tuple[list[float], list[tuple[float, str]]]:
    """y of every row, with a gap and a heading before each number of workers."""
    places: list[float] = []
    headings = []
    at = -1.0
    before = None
    for count, slowed in zip(table["replicas"], table["straggler"], strict=True):
        heading = words.workers(count) + (f", {slowed}" if slowed else "")
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
        text = "0"
    elif ratio.n:
        text = f"× {ratio.center:.3g}"
    else:
        text = "wire not counted"
    ax.annotate(
        text,
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


def staleness(spec: FigureSpec, material: Material) -> list[Drawing]:
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
        "gradient was "
        "computed with. Bar: median over the runs; line: range. "
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
    lines = [words.short(name["series"])] if several else []
    lines.append(words.workers(name["replicas"]))
    if name["straggler"]:
        lines.append(f"{name['straggler']} slower")
    return "\n".join(lines)


def rank_split(spec: FigureSpec, material: Material) -> list[Drawing]:
    """Share of each rank's wall time by what it did, one panel per cell; the title says what came
    out of it."""
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
    crowded = (
        " ° oversubscribed: more ranks than cores, its samples/s rank nothing."
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
    caption = (
        "Share of each rank's wall time (median over the runs). Blocked time on loopback is "
        "CPU-bound waiting for "
        f"other ranks and for the scheduler, not exposed network time.{slowed}{mixed}{crowded} "
        f"{material.provenance(list(names['cell_id']))}"
    )
    return [
        Drawing(
            spec.name,
            layout.figure,
            caption,
            list(names["cell_id"]),
            used,
            layout.whole,
            boxes[: len(names)],
            alt="share of wall time computing, blocked and idle for every rank",
        )
    ]


def _ranks(ax: Axes, rows: pd.DataFrame, bars: int, *, readable: float) -> None:
    """One bar per rank; room for `bars`, so that all panels of a line have equally thick ones.

    `readable`: the least share whose percentage is written into the bar.
    """
    labels = []
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
        labels.append(f"{row['role']} {row['rank']}{slowed}")
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(bars - 0.5, -0.5)
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.5, 1.0], ["0", "50 %", "100 %"])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def _split_title(ax: Axes, name: Mapping[Hashable, Any]) -> None:
    rate: Summary = name["samples_per_s"]
    mark = "°" if name["oversubscribed"] else ""
    slowed = f"{name['straggler']} slower, " if name["straggler"] else ""
    first = f"{words.short(name['series'])}, {words.workers(name['replicas'])}"
    ax.set_title(
        f"{first}\n{slowed}{words.number(rate.center)} samples/s{mark}",
        loc="left",
        linespacing=1.35,
    )
