"""The kinds that draw virtual worlds: quantities against the number of workers, and both worlds side by side, apart.

Virtual seconds come from a simulated clock and network; they share no axis with wall seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from benchsuite.analysis.statistics import Summary
from benchsuite.report import words
from benchsuite.report.canvas import Drawing, Margins, grid
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec
from benchsuite.report.style import SOFT, WIDE_IN, Look

TOP = 0.955  # of a panel's height: where a median that was never reached stands


@dataclass(frozen=True)
class Quantity:
    """What can be drawn against workers."""

    label: str
    meaning: str
    scale: str  # of the y axis: "log", "linear", "count" (linear up to 1, then logarithmic)


QUANTITIES: Mapping[str, Quantity] = {
    "staleness": Quantity("staleness (versions)", "mean over updates: version at the update minus version of its "
                          "gradient; dotted: N - 1", "count"),
    "waiting": Quantity("share of time waiting", "share of the workers' virtual time in which they compute nothing; "
                        "dotted, for exponential times: 1 - 1/H_N of synchronous training", "share"),
    "samples_per_s": Quantity("samples per virtual second", "samples over virtual seconds, all workers together, after "
                              "the warm-up", "log"),
    "seconds_to_target": Quantity("virtual seconds to target", "virtual seconds until an evaluation first met the "
                                  "target, warm-up included", "log"),
    "samples_to_target": Quantity("samples to target", "samples used until an evaluation first met the target", "log"),
}  # fmt: skip
_COLUMNS = {"samples_per_s": "virtual_samples_per_s", "seconds_to_target": "virtual_seconds_to_target"}


def scaling(spec: FigureSpec, material: Material) -> list[Drawing]:
    """One drawing per quantity and workload; panels by compute times (rows) and links (columns), or the other way."""
    table = _rows(spec, material)
    drawings = []
    workloads = list(dict.fromkeys(table["workload"]))
    for workload in workloads:
        for y in spec.values["y"]:
            column = _COLUMNS.get(y, y)
            part = table[(table["workload"] == workload) & (table[column].map(lambda s: s.n) > 0)]
            if part.empty:
                continue
            suffix = f"_{workload.replace('/', '_')}" if len(workloads) > 1 else ""
            name = spec.name if len(spec.values["y"]) == 1 else f"{spec.name}_{y}"
            drawings.append(_panels(f"{name}{suffix}", part, material, y=y, spec=spec))
    return drawings


def _rows(spec: FigureSpec, material: Material) -> pd.DataFrame:
    return material.in_virtual_time.of(material.virtual, spec).sort_values("order", kind="stable")


def _panels(name: str, table: pd.DataFrame, material: Material, *, y: str, spec: FigureSpec) -> Drawing:
    across, down = spec.values["columns"][0], spec.values["rows"][0]
    columns = list(dict.fromkeys(table[across])) if across else [""]
    rows = list(dict.fromkeys(table[down])) if down else [""]
    legend = [material.looks[series] for series in dict.fromkeys(table["series"])]
    margins = Margins(left=0.5, right=0.12, top=0.22, bottom=0.36, between=0.28)
    layout = grid([1.25] * len(rows), len(columns), width=WIDE_IN, legend=legend, margins=margins)
    counts = sorted(set(table["replicas"]))
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            ax = layout.axes[r][c]
            inside = table[(table[across] == column) if across else (table["order"] >= 0)]
            inside = inside[(inside[down] == row) if down else (inside["order"] >= 0)]
            _theory(ax, y, inside, counts)
            missed = _lines(ax, inside, material, _COLUMNS.get(y, y))
            said = [str(text) for text in ((row if down else ""), (column if across else "")) if text]
            ax.set_title("; ".join(said), loc="left")
            _style(ax, y, counts, first=c == 0, last=r == len(rows) - 1)
            if missed:
                _strip(ax)
    _share_limits(layout.axes, y)
    ids = list(table["cell_id"])
    boxes = [box for line in layout.cells for box in line]
    return Drawing(
        name, layout.figure, _caption(table, material, y), ids, legend, layout.whole, boxes,
        alt=f"{QUANTITIES[y].label} against the number of workers, in virtual time",
    )  # fmt: skip


def _caption(table: pd.DataFrame, material: Material, y: str) -> str:
    quantity = QUANTITIES[y]
    arrives = y.endswith("to_target")
    edge = (
        " A mark at the upper edge: the median run did not arrive within the budget; a bar to the edge: some did not."
        if arrives else ""
    )  # fmt: skip
    goal = ""
    if arrives:
        target = material.in_virtual_time.target(str(table["workload"].iloc[0]))
        if target:
            sign, unit = ("≥" if target["direction"] == "max" else "≤"), str(target.get("unit") or "")
            goal = f" Target: {target['metric']} {sign} {target['target']:g}{unit}."
    by_size = sorted({
        f"{words.label(series)}: {text} with {words.workers(n)}"
        for series, text, n in zip(table["series"], table["by_size"], table["replicas"], strict=True) if text
    }, key=lambda text: (text.partition(":")[0], int(text.rpartition(" ")[0].rpartition(" ")[2])))  # fmt: skip
    sizes = f" {'; '.join(by_size)}." if by_size else ""
    timing = " Times only: no gradient was computed." if set(table["gradients"]) == {"none"} else ""
    return (
        f"{quantity.label[0].upper()}{quantity.label[1:]} ({quantity.meaning}). Line: median, bar: range or interval."
        f"{edge}{goal}{sizes}{timing} {material.in_virtual_time.provenance(list(table['cell_id']))}"
    )


def _lines(ax: Axes, table: pd.DataFrame, material: Material, column: str) -> bool:
    """One line per series; whether a median was never reached."""
    missed = False
    series = list(dict.fromkeys(table["series"]))
    for position, name in enumerate(series):
        points = table[table["series"] == name].sort_values("replicas")
        shift = 2 ** (0.09 * (position - (len(series) - 1) / 2))  # bars of several series beside each other
        missed |= _line(ax, points, column, material.looks[name], shift)
    return missed


def _line(ax: Axes, points: pd.DataFrame, column: str, look: Look, shift: float) -> bool:
    xs, ys, missed = [], [], False
    for point in points.to_dict("records"):
        summary: Summary = point[column]
        x = float(point["replicas"]) * shift
        if math.isinf(summary.center):
            missed = True
            ax.plot([x], [TOP], marker=look.marker, linestyle="none", color=look.color, markersize=4.2,
                    markerfacecolor="white", transform=ax.get_xaxis_transform(), zorder=3, gid="missed")  # fmt: skip
            xs.append(x)
            ys.append(math.nan)
            continue
        xs.append(x)
        ys.append(summary.center)
        if math.isinf(summary.high):
            _bar_to_the_edge(ax, x, summary.low, look.color)
        elif summary.high > summary.low:
            ax.vlines(x, summary.low, summary.high, color=look.color, linewidth=0.9, zorder=2)
    ax.plot(xs, ys, color=look.color, marker=look.marker, linestyle=look.line, markersize=3.4, zorder=2.5)
    return missed


def _bar_to_the_edge(ax: Axes, x: float, low: float, color: str) -> None:
    """From the lowest run to the upper edge, whatever the limits will be."""
    ax.annotate(
        "", xy=(x, 1.0), xycoords=("data", "axes fraction"), xytext=(x, low), textcoords="data",
        arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.9, "linestyle": (0, (2, 1.2))},
    )  # fmt: skip


def _theory(ax: Axes, y: str, table: pd.DataFrame, counts: Sequence[int]) -> None:
    """Known closed forms, dotted."""
    style: dict[str, Any] = {"color": SOFT, "linewidth": 0.9, "linestyle": (0, (1, 1.6)), "gid": "theory"}
    if y == "staleness":
        ax.plot(counts, [n - 1 for n in counts], **style)
    elif y == "waiting" and set(table["spread"]) == {"exponential"}:
        ax.plot(counts, [1 - 1 / math.fsum(1 / k for k in range(1, n + 1)) for n in counts], **style)


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
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.tick(value)))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.tick(value)))
    ax.grid(axis="y")
    if first:
        ax.set_ylabel(QUANTITIES[y].label)
    if last:
        ax.set_xlabel("workers")


def _strip(ax: Axes) -> None:
    """Where the marks of medians stand that were never reached."""
    low = 2 * TOP - 1
    ax.fill_between([0, 1], [low, low], [1, 1], transform=ax.transAxes, color=SOFT, alpha=0.1, linewidth=0)
    ax.text(0.012, TOP, "> budget", transform=ax.transAxes, va="center", ha="left", color=SOFT, fontsize=6)


def _share_limits(rows: Sequence[Sequence[Axes]], y: str) -> None:
    """Equal y ranges in all panels, with room above for what was never reached."""
    if QUANTITIES[y].scale == "share":
        return
    axes = [ax for row in rows for ax in row if ax.has_data()]
    low, high = min(ax.get_ylim()[0] for ax in axes), max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, high * (high / low) ** 0.12 if QUANTITIES[y].scale == "log" else high)


def two_worlds(spec: FigureSpec, material: Material) -> list[Drawing]:
    """Left what this machine could measure, right what the virtual clock says: two axes, two kinds of seconds."""
    measured, virtual = material.of(material.scaling, spec), _rows(spec, material)
    virtual = virtual[virtual["virtual_samples_per_s"].map(lambda s: s.n) > 0]
    if virtual.empty:
        return []
    series = list(dict.fromkeys([*measured["series"], *virtual["series"]]))
    legend = [material.looks[name] for name in series]
    layout = grid([1.9], 2, width=WIDE_IN, legend=legend)
    left, right = layout.axes[0]
    whole = measured[~measured["oversubscribed"]]
    counts = sorted({*whole["replicas"], *virtual["replicas"]})
    for position, name in enumerate(series):
        shift = 2 ** (0.09 * (position - (len(series) - 1) / 2))
        for ax, table, column in ((left, whole, "samples_per_s"), (right, virtual, "virtual_samples_per_s")):
            points = table[table["series"] == name].sort_values("replicas")
            if len(points):
                _line(ax, points, column, material.looks[name], shift)
    for ax, title in (
        (left, "measured here: samples per second"), (right, "virtual: samples per virtual second"),
    ):  # fmt: skip
        _style(ax, "samples_per_s", counts, first=False, last=True)
        ax.set_title(title, loc="left")
    left_out = int(measured["oversubscribed"].sum())
    caption = (
        "Left: total samples over total wall time, where workers and servers have a core each"
        + (f" ({words.count_of(left_out, 'cell')} with more ranks than cores left out)" if left_out else "")
        + f". {material.provenance(list(whole['cell_id']))} Right: the same strategy files on a simulated clock and "
        f"network, {_world(virtual)}; {material.in_virtual_time.provenance(list(virtual['cell_id']))} The two kinds of "
        "seconds are not compared: the virtual machine has a core and a port for every rank."
    )
    ids = [*whole["cell_id"], *virtual["cell_id"]]
    return [Drawing(
        spec.name, layout.figure, caption, ids, legend, layout.whole, layout.columns,
        alt="samples per second against workers: measured on this machine, and in virtual time",
    )]  # fmt: skip


def _world(table: pd.DataFrame) -> str:
    """Compute times and links of these cells, in words."""
    spreads, links = (list(dict.fromkeys(table[name])) for name in ("spread", "link"))
    return f"{' / '.join(spreads)} times, links {' / '.join(links)}"
