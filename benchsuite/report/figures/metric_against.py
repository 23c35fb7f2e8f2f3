"""Loss and metric against samples, seconds and bytes: the learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from benchsuite.analysis.convergence import band
from benchsuite.report import text
from benchsuite.report.drawing.canvas import Drawing, Margins, grid
from benchsuite.report.drawing.style import SOFT, WIDE_IN, marker_face
from benchsuite.report.kinds import Kind
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec
from benchsuite.report.words import labels

KIND = Kind(
    title="Does it train, and what does it take?",
    clock="wall",
    keys={"x": ("samples", "seconds", "bytes"), "y": ("loss", "metric")},
    place=10,
)


X_LABELS = {
    "samples": "samples",
    "seconds": "seconds (wall clock, evaluation excluded)",
    "bytes": "payload bytes over all ranks",
}


_BANDS = {
    "samples": "band: range over the runs",
    "seconds": "band: range over the runs, evaluation by evaluation (x: their median). Hollow "
    "marks: oversubscribed or "
    "contended, no claim about time",
    "bytes": "band: range over the runs, evaluation by evaluation (x: their median)",
}


MAX_COLUMNS = 4


def draw(spec: FigureSpec, material: Material) -> list[Drawing]:
    """One figure per x and workload, one column of panels per number of workers."""
    drawings = []
    names = material.of(material.names, spec)
    names = names[names["cell_id"].isin(set(material.curves["cell_id"]))]
    workloads = list(dict.fromkeys(names["workload"]))

    for workload in workloads:
        for x in spec.values["x"]:
            suffix = f"_{workload.replace('/', '_')}" if len(workloads) > 1 else ""
            name = f"{spec.name}_{x}{suffix}"
            drawings.append(
                _curves(
                    name, names[names["workload"] == workload], material, x=x, ys=spec.values["y"]
                )
            )

    return drawings


def _curves(
    name: str, names: pd.DataFrame, material: Material, *, x: str, ys: Sequence[str]
) -> Drawing:
    workload = str(names["workload"].iloc[0])
    target = material.target(workload)
    counts = sorted(set(names["replicas"]))
    shown = counts[:MAX_COLUMNS] if len(counts) <= MAX_COLUMNS else _spread(counts)
    legend = [material.looks[series] for series in dict.fromkeys(names["series"])]
    layout = grid(
        [1.25] * len(ys),
        len(shown),
        width=WIDE_IN,
        legend=legend,
        margins=Margins(top=0.2, between=0.22),
    )

    for column, count in enumerate(shown):
        group = names[names["replicas"] == count]
        silent = []

        for row, y in enumerate(ys):
            ax = layout.axes[row][column]
            silent = _lines(ax, group, material, x=x, y=y)
            _style_y(ax, y, target, first=column == 0)
            _style_x(ax, x, last=row == len(ys) - 1)

        layout.axes[0][column].set_title(labels.workers(count), loc="left", fontweight="bold")

        if silent:
            ax = layout.axes[0][column]
            phrase = "no bytes:\n" + "\n".join(silent)
            ax.text(
                0.98,
                0.98,
                phrase,
                transform=ax.transAxes,
                ha="right",
                va="top",
                color=SOFT,
                fontsize=6.5,
            )

    _share_limits(layout.axes)
    ids = [
        cell_id
        for cell_id, count in zip(names["cell_id"], names["replicas"], strict=True)
        if count in shown
    ]
    caption = _curve_caption(x, ys, target)
    return Drawing(
        name,
        layout.figure,
        f"{caption} {material.provenance(ids)}",
        ids,
        legend,
        layout.whole,
        layout.columns,
        alt=f"{' and '.join(ys)} of {workload} against {x}, one panel per number of workers",
    )


def _curve_caption(x: str, ys: Sequence[str], target: Mapping[str, object]) -> str:
    shown = {
        "loss": "training loss (mean since the evaluation before)",
        "metric": str(target.get("metric", "metric")),
    }
    what = " and ".join(shown[y] for y in ys)
    by_error = _is_accuracy(target) and "metric" in ys
    logarithmic = (
        " Accuracy is spaced by its error: equal steps halve what is still wrong."
        if by_error
        else ""
    )
    return f"{what[0].upper()}{what[1:]} against {x}; line: median, {_BANDS[x]}.{logarithmic}"


def _lines(ax: Axes, group: pd.DataFrame, material: Material, *, x: str, y: str) -> list[str]:
    """Draws one line per cell; returns the short names of series that never moved along x."""
    silent = []
    flags = material.scaling
    hollow = (
        set(flags.loc[flags["oversubscribed"] | flags["contended"], "cell_id"])
        if x == "seconds"
        else set()
    )

    for position, cell in enumerate(group.itertuples()):
        look = material.looks[str(cell.series)]
        line = band(material.curves[material.curves["cell_id"] == cell.cell_id], x=x, y=y)
        if line.empty:
            continue

        if float(line["x"].iloc[-1]) == 0:
            silent.append(labels.short(str(cell.series)))
            continue

        ax.fill_between(
            line["x"], line["low"], line["high"], color=look.color, alpha=0.13, linewidth=0
        )
        every = max(1, len(line) // 7)
        ax.plot(
            line["x"],
            line["center"],
            color=look.color,
            marker=look.marker,
            linestyle=look.line,
            markersize=3.2,
            markevery=(position * every // 5 + 1, every),
            zorder=2 + position * 0.1,
            **marker_face(look, hollow=cell.cell_id in hollow),
        )

    return silent


def _is_accuracy(target: Mapping[str, object]) -> bool:
    return target.get("unit") == "%" and target.get("direction") == "max"


def _style_y(ax: Axes, y: str, target: Mapping[str, object], *, first: bool) -> None:
    ax.grid(axis="y")

    if y == "loss":
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if first:
            ax.set_ylabel("training loss")
        return

    unit = f" ({target['unit']})" if target.get("unit") else ""
    if first:
        ax.set_ylabel(f"{target.get('metric', 'metric')}{unit}")

    if _is_accuracy(target):
        # Spaced by the logarithm of the error 100 - accuracy, which must not become 0.
        floor = 0.2
        ax.set_yscale(
            "function",
            functions=(
                lambda value: -np.log(np.maximum(100 - np.asarray(value, dtype=float), floor)),
                lambda value: 100 - np.exp(-np.asarray(value, dtype=float)),
            ),
        )
        ax.yaxis.set_major_locator(FixedLocator([0, 50, 80, 90, 95, 97.5, 99]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    bound = target.get("target")

    if isinstance(bound, (int, float)):
        ax.axhline(bound, color=SOFT, linewidth=0.8, linestyle=(0, (1, 1.5)), zorder=1.5)
        ax.annotate(
            "target",
            (0, bound),
            xycoords=("axes fraction", "data"),
            ha="left",
            va="bottom",
            color=SOFT,
            fontsize=6.5,
            xytext=(3, 1),
            textcoords="offset points",
        )


def _style_x(ax: Axes, x: str, *, last: bool) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: text.tick(value, "B" if x == "bytes" else ""))
    )
    ax.set_xlim(left=0)
    if last:
        ax.set_xlabel(X_LABELS[x].split(" (")[0])


def _share_limits(rows: Sequence[Sequence[Axes]]) -> None:
    """Gives the panels of a row equal y limits, so that columns can be compared."""
    for row in rows:
        limits = [ax.get_ylim() for ax in row if ax.has_data()]
        for ax in row if limits else ():
            ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _spread(counts: Sequence[int]) -> list[int]:
    """As many counts as fit side by side: the first, the last and evenly between."""
    step = (len(counts) - 1) / (MAX_COLUMNS - 1)
    return [counts[round(i * step)] for i in range(MAX_COLUMNS)]
