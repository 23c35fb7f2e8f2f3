"""Lines against the number of workers in virtual time.

A median that was never reached is a mark above its panel, on no scale. Virtual seconds come from a
simulated clock and network; they share no axis with wall seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from benchsuite.analysis.statistics import Summary
from benchsuite.report import text
from benchsuite.report.drawing.style import Look
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec

MISSED = 1.075  # of a panel's height, above it: where a median stands that was never reached


@dataclass(frozen=True)
class Quantity:
    """A quantity that can be drawn against the number of workers."""

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


def cells_of(spec: FigureSpec, material: Material) -> pd.DataFrame:
    """The virtual clock's rows that the entry wants, in the plan's order."""
    return material.in_virtual_time.of(material.virtual, spec).sort_values("order", kind="stable")


def draw_line(ax: Axes, points: pd.DataFrame, column: str, look: Look, shift: float) -> bool:
    """Medians joined by a line, with their bars; returns whether a median was never reached.

    `shift` moves the marks along the logarithmic axis, so that bars of several lines stand apart.
    """
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
    """Draws a bar from the lowest run to the upper edge, whatever the limits will be."""
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


def style_axes(ax: Axes, y: str, counts: Sequence[int], *, first: bool, last: bool) -> None:
    """Scales, ticks and labels of a panel of the quantity `y`; labels only at the outer panels."""
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
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text.tick(value)))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text.tick(value)))

    ax.grid(axis="y")
    if first:
        ax.set_ylabel(QUANTITIES[y].label)
    if last:
        ax.set_xlabel("workers")


def share_limits(axes: Sequence[Axes], y: str) -> None:
    """Gives all panels of a quantity equal y limits, with room above for medians never reached."""
    if QUANTITIES[y].scale == "share":
        return
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    # Marks that stand on the upper edge would be cut in half.
    high *= 1.4 if QUANTITIES[y].scale == "count" else 1.0
    steps = (1.0, 3.0) if high > 20 * low else (1.0, 2.0, 5.0)

    for ax in axes:
        ax.set_ylim(low, high)
        if QUANTITIES[y].scale == "log":
            ax.yaxis.set_major_locator(LogLocator(base=10, subs=steps))


def said_of_worlds(table: pd.DataFrame) -> str:
    """The compute times and links of these cells, in words."""
    spreads, links = (list(dict.fromkeys(table[name])) for name in ("spread", "link"))
    return (
        f"{' / '.join(spreads)}; "
        f"{' / '.join(f'links {link}' if link == 'free' else link for link in links)}"
    )
