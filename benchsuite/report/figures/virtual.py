"""The kinds that draw virtual worlds: quantities against the number of workers, and both worlds
side by side, apart.

Virtual seconds come from a simulated clock and network; they share no axis with wall seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from benchsuite.analysis.statistics import Summary
from benchsuite.report.figures.canvas import Drawing, Margins, grid
from benchsuite.report.figures.style import SOFT, WIDE_IN, Look
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec
from benchsuite.report.words import labels

MISSED = 1.075  # of a panel's height, above it: where a median stands that was never reached


@dataclass(frozen=True)
class Quantity:
    """What can be drawn against workers."""

    label: str
    meaning: str
    scale: str  # of the y axis: "log", "linear", "count" (linear up to 1, then logarithmic)


QUANTITIES: Mapping[str, Quantity] = {
    "staleness": Quantity(
        "staleness (versions)",
        "mean over updates: version at the update minus version of its gradient; dotted: N - 1",
        "count",
    ),
    "waiting": Quantity(
        "share of time waiting",
        "share of the workers' virtual time in which they compute nothing; "
        "dotted, for exponential times: 1 - 1/H_N of synchronous training",
        "share",
    ),
    "samples_per_s": Quantity(
        "samples per virtual second",
        "samples over virtual seconds, all workers together, after the warm-up",
        "log",
    ),
    "seconds_to_target": Quantity(
        "virtual seconds to target",
        "virtual seconds until an evaluation first met the target, warm-up included",
        "log",
    ),
    "samples_to_target": Quantity(
        "samples to target", "samples used until an evaluation first met the target", "log"
    ),
}
_COLUMNS = {
    "samples_per_s": "virtual_samples_per_s",
    "seconds_to_target": "virtual_seconds_to_target",
}


@dataclass(frozen=True)
class Panel:
    """One axes: which cells, which quantity."""

    table: pd.DataFrame
    y: str
    title: str


def scaling(spec: FigureSpec, material: Material) -> list[Drawing]:
    """Per workload one drawing of panels by compute times and links for each quantity, or, where
    neither is told apart, one drawing with the quantities side by side."""
    table = _rows(spec, material)
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
                drawings.append(_draw(f"{spec.name}{suffix}", panels, material))
            continue
        for y in drawn:
            name = spec.name if len(spec.values["y"]) == 1 else f"{spec.name}_{y}"
            drawings.append(
                _draw(f"{name}{suffix}", _grid(_with(mine, y), y, across, down), material)
            )
    return drawings


def _rows(spec: FigureSpec, material: Material) -> pd.DataFrame:
    return material.in_virtual_time.of(material.virtual, spec).sort_values("order", kind="stable")


def _with(table: pd.DataFrame, y: str) -> pd.DataFrame:
    """The cells that have this quantity."""
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


def _draw(name: str, panels: Sequence[Sequence[Panel]], material: Material) -> Drawing:
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
            _style(
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
        _share_limits(axes, y)
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
        f"{meanings[0].upper()}{meanings[1:]}. Line: median, bar: range or interval."
        f"{edge}{goal}{_by_size(table)}{timing} "
        f"Compute times and links: {_world(table)}. "
        f"{material.in_virtual_time.provenance(list(table['cell_id']))}"
    )


def _by_size(table: pd.DataFrame) -> str:
    """Options that go with the number of workers: `k sync: backup_workers = 1, 2 with 4, 16
    workers.`"""
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
    """One line per series; whether a median was never reached."""
    missed = False
    series = list(dict.fromkeys(table["series"]))
    for position, name in enumerate(series):
        points = table[table["series"] == name].sort_values("replicas")
        shift = 2 ** (
            0.09 * (position - (len(series) - 1) / 2)
        )  # bars of several series beside each other
        missed |= _line(ax, points, column, material.looks[name], shift)
    return missed


def _line(ax: Axes, points: pd.DataFrame, column: str, look: Look, shift: float) -> bool:
    xs = []
    ys = []
    missed = False
    for point in points.to_dict("records"):
        summary: Summary = point[column]
        x = float(point["replicas"]) * shift
        if math.isinf(summary.center):
            missed = True
            ax.plot(
                [x],
                [MISSED],
                marker=look.marker,
                linestyle="none",
                color=look.color,
                markersize=4.2,
                clip_on=False,
                markerfacecolor="white",
                transform=ax.get_xaxis_transform(),
                zorder=3,
                gid="missed",
            )
            xs.append(x)
            ys.append(math.nan)
            continue
        xs.append(x)
        ys.append(summary.center)
        if math.isinf(summary.high):
            _bar_to_the_edge(ax, x, summary.low, look.color)
        elif summary.high > summary.low:
            ax.vlines(x, summary.low, summary.high, color=look.color, linewidth=0.9, zorder=2)
    ax.plot(
        xs,
        ys,
        color=look.color,
        marker=look.marker,
        linestyle=look.line,
        markersize=3.4,
        zorder=2.5,
    )
    return missed


def _bar_to_the_edge(ax: Axes, x: float, low: float, color: str) -> None:
    """From the lowest run to the upper edge, whatever the limits will be."""
    ax.annotate(
        "",
        xy=(x, 2 * MISSED - 1.02),
        xycoords=("data", "axes fraction"),
        xytext=(x, low),
        textcoords="data",
        arrowprops={
            "arrowstyle": "-",
            "color": color,
            "linewidth": 0.9,
            "linestyle": (0, (2, 1.2)),
        },
    )


def _theory(ax: Axes, y: str, table: pd.DataFrame, counts: Sequence[int]) -> None:
    """Known closed forms, dotted."""
    style: dict[str, Any] = {
        "color": SOFT,
        "linewidth": 0.9,
        "linestyle": (0, (1, 1.6)),
        "gid": "theory",
    }
    if y == "staleness":
        ax.plot(counts, [n - 1 for n in counts], **style)
    elif y == "waiting" and set(table["spread"]) == {"exponential"}:
        ax.plot(
            counts, [1 - 1 / math.fsum(1 / k for k in range(1, n + 1)) for n in counts], **style
        )


def _style(ax: Axes, y: str, counts: Sequence[int], *, first: bool, last: bool) -> None:
    scale = QUANTITIES[y].scale
    ax.set_xscale("log", base=2)
    shown = counts if len(counts) <= 6 else counts[:: -(-len(counts) // 6)]
    ax.set_xticks(shown, [str(count) for count in shown])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(counts[0] / 1.35, counts[-1] * 1.35)
    if scale == "share":
        ax.set_ylim(0, 1)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        ax.yaxis.set_major_locator(MaxNLocator(5))
    elif scale == "count":
        ax.set_yscale("symlog", linthresh=1)
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: labels.tick(value)))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: labels.tick(value)))
    ax.grid(axis="y")
    if first:
        ax.set_ylabel(QUANTITIES[y].label)
    if last:
        ax.set_xlabel("workers")


def _strip(ax: Axes) -> None:
    """Where the marks of medians stand that were never reached."""
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


def _share_limits(axes: Sequence[Axes], y: str) -> None:
    """Equal y ranges in all panels, with room above for what was never reached."""
    if QUANTITIES[y].scale == "share":
        return
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    high *= 1.4 if QUANTITIES[y].scale == "count" else 1.0  # marks on the edge would be cut
    steps = (1.0, 3.0) if high > 20 * low else (1.0, 2.0, 5.0)
    for ax in axes:
        ax.set_ylim(low, high)
        if QUANTITIES[y].scale == "log":
            ax.yaxis.set_major_locator(LogLocator(base=10, subs=steps))


def two_worlds(spec: FigureSpec, material: Material) -> list[Drawing]:
    """Left what this machine could measure, right what the virtual clock says: two axes, two kinds
    of seconds."""
    measured = material.of(material.scaling, spec)
    virtual = _rows(spec, material)
    virtual = virtual[virtual["virtual_samples_per_s"].map(lambda s: s.n) > 0]
    if virtual.empty:
        return []
    series = list(dict.fromkeys([*measured["series"], *virtual["series"]]))
    legend = [material.looks[name] for name in series]
    layout = grid([1.9], 2, width=WIDE_IN, legend=legend)
    left, right = layout.axes[0]
    whole = measured[~measured["oversubscribed"].astype(bool)]
    counts = sorted({*whole["replicas"], *virtual["replicas"]})
    for position, name in enumerate(series):
        shift = 2 ** (0.09 * (position - (len(series) - 1) / 2))
        for ax, table, column in (
            (left, whole, "samples_per_s"),
            (right, virtual, "virtual_samples_per_s"),
        ):
            points = table[table["series"] == name].sort_values("replicas")
            if len(points):
                _line(ax, points, column, material.looks[name], shift)
    for ax, title in (
        (left, "measured here: samples per second"),
        (right, "virtual: samples per virtual second"),
    ):
        _style(ax, "samples_per_s", counts, first=False, last=True)
        _share_limits([ax], "samples_per_s")
        ax.set_title(title, loc="left")
    left_out = int(measured["oversubscribed"].sum())
    caption = (
        "Left: total samples over total wall time, where workers and servers have a core each"
        + (
            f" ({labels.count_of(left_out, 'cell')} with more ranks than cores left out)"
            if left_out
            else ""
        )
        + f". {material.provenance(list(whole['cell_id']))} Right: the same strategy files on a "
        "simulated clock and "
        f"network, {_world(virtual)}; "
        f"{material.in_virtual_time.provenance(list(virtual['cell_id']))} The two kinds of "
        "seconds are not compared: the virtual machine has a core and a port for every rank."
    )
    ids = [*whole["cell_id"], *virtual["cell_id"]]
    return [
        Drawing(
            spec.name,
            layout.figure,
            caption,
            ids,
            legend,
            layout.whole,
            layout.columns,
            alt="samples per second against workers: measured on this machine, and in virtual time",
        )
    ]


def _world(table: pd.DataFrame) -> str:
    """Compute times and links of these cells, in words."""
    spreads, links = (list(dict.fromkeys(table[name])) for name in ("spread", "link"))
    return (
        f"{' / '.join(spreads)}; "
        f"{' / '.join(f'links {link}' if link == 'free' else link for link in links)}"
    )
