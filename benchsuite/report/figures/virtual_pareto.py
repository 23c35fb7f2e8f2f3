"""Counted bytes to target against virtual seconds to target, one panel per slowed worker.

Drawn and named is the front: strategies that no other beats on both by their medians. All others
are pale. A strategy that missed the target is listed in words and has no place among numbers; so is
one that sends nothing, since its workers share the memory of one host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchsuite.analysis.arrival import centers, front
from benchsuite.analysis.statistics import Summary
from benchsuite.report import text
from benchsuite.report.drawing.canvas import Drawing, Margins, grid
from benchsuite.report.drawing.strategy_rows import by_straggler, setting, worlds
from benchsuite.report.drawing.style import INK, SOFT, WIDE_IN, Look, families
from benchsuite.report.kinds import Kind
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec
from benchsuite.report.words import labels
from benchsuite.report.words.sentences import listed, names

KIND = Kind(
    title="Which strategy is beaten by no other?",
    clock="virtual",
    keys={"goal": ("target", "easy", "hard")},
    place=80,
)

PALE = 0.38  # opacity of what the front beats
LINE_IN = 0.135  # a line of the list of names below a panel
NEAR_PT = 7.5  # numbers nearer to each other than this are moved apart


def draw(spec: FigureSpec, material: Material) -> list[Drawing]:
    """One drawing per group of cells that may be compared (`strategy_rows.worlds`)."""
    name = names(material, short=True)
    drawings = []

    for suffix, table in worlds(spec, material):
        parts = by_straggler(table)
        fronts = [unbeaten(part) for _, part in parts]
        if not any(fronts):
            continue
        longest = max(map(len, fronts))
        margins = Margins(left=0.66, right=0.12, top=0.24, bottom=0.48 + LINE_IN * longest)
        drawn = table[_has_place(table)]
        looks = families(_family(strategy) for strategy in drawn["strategy"])
        layout = grid(
            [1.9], len(parts), width=WIDE_IN, legend=list(looks.values()), margins=margins
        )

        for ax, (slowed, part), chosen in zip(layout.axes[0], parts, fronts, strict=True):
            _panel(ax, part, chosen, [name(one) for one in _series(part, chosen)], looks)
            ax.set_title(labels.slowed(slowed), loc="left", fontweight="bold")

        _share(layout.axes[0])
        for ax, (_, part), chosen in zip(layout.axes[0], parts, fronts, strict=True):
            _numbers(ax, part, chosen)
        caption = (
            f"{_meaning(drawn)} "
            f"{missed(parts, material)}{_silent(parts, material)}{setting(table, material)}"
        )
        drawings.append(
            Drawing(
                f"{spec.name}{suffix}",
                layout.figure,
                caption,
                list(table["cell_id"]),
                list(looks.values()),
                layout.whole,
                layout.columns,
                alt="bytes to target against virtual seconds to target, the strategies that no "
                "other beats named",
            )
        )

    return drawings


def _has_place(table: pd.DataFrame) -> list[bool]:
    """Whether a cell's medians are numbers that a logarithmic axis has."""
    pairs = zip(table["seconds"], table["bytes"], strict=True)
    return [math.isfinite(seconds.center) and amount.center > 0 for seconds, amount in pairs]


def _family(strategy: object) -> str:
    """`synchronous`, `synchronous compressed`: what is told apart by its look."""
    sync, _, *compression = str(strategy).split("/")
    return f"{sync} compressed" if compression else sync


def unbeaten(part: pd.DataFrame) -> list[str]:
    """The cell ids of the front of one world and straggler, fastest first.

    A strategy that sends nothing is not on it.
    """
    points = centers(part, "seconds", "bytes")
    return front({cell_id: point for cell_id, point in points.items() if point[1] > 0})


def _silent(parts: Sequence[tuple[str, pd.DataFrame]], material: Material) -> str:
    """Names those who send nothing: they are on no axis of bytes, and no rival of who does."""
    name = names(material, short=True)
    said: dict[str, list[str]] = {}

    for slowed, part in parts:
        for row in part.to_dict("records"):
            if row["bytes"].center == 0:
                time = f"{labels.slowed(slowed)} {text.quantity(row['seconds'])}"
                said.setdefault(name(str(row["series"])), []).append(time)

    return "".join(
        f"Nor is {who}: it sends nothing, its workers share one host's memory (virtual seconds: "
        f"{'; '.join(times)}). "
        for who, times in said.items()
    )


def _meaning(drawn: pd.DataFrame) -> str:
    return (
        "Payload of all ranks against virtual seconds, both until an evaluation first met the "
        "target. Numbered: the front, whom no other strategy beats on both; above and right of the "
        f"line is what it beats (pale). Mark and bars: {text.spreads(drawn['seconds'])}."
    )


def missed(parts: Sequence[tuple[str, pd.DataFrame]], material: Material) -> str:
    """Names those whose median run did not arrive, straggler by straggler."""
    name = names(material, short=True)
    said = []

    for slowed, part in parts:
        late = [
            f"{name(str(row['series']))} {text.quantity(row['seconds'])}"
            for row in part.to_dict("records")
            if math.isinf(row["seconds"].center)
        ]
        if late:
            said.append(f"{labels.slowed(slowed)}: {', '.join(late)}")

    return (
        f"Not on the picture, since their median run did not arrive: {'; '.join(said)}. "
        if said
        else ""
    )


def _series(part: pd.DataFrame, cell_ids: Sequence[str]) -> list[str]:
    known = dict(zip(part["cell_id"], part["series"], strict=True))
    return [str(known[cell_id]) for cell_id in cell_ids]


def _panel(
    ax: Axes,
    part: pd.DataFrame,
    on_front: Sequence[str],
    called: Sequence[str],
    looks: Mapping[str, Look],
) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    rows = {str(row["cell_id"]): row for row in part.to_dict("records")}

    for cell_id, row in rows.items():
        x = row["seconds"].center
        y = row["bytes"].center

        if cell_id not in on_front and math.isfinite(x) and y > 0:
            look = looks[_family(row["strategy"])]
            pale: dict[str, Any] = {
                "color": look.color,
                "alpha": PALE,
                "markersize": 3.6,
                "markeredgewidth": 0,
            }
            ax.plot([x], [y], look.marker, gid="beaten", zorder=2, **pale)

    chosen = [rows[cell_id] for cell_id in on_front]
    _stairs(ax, [(row["seconds"].center, row["bytes"].center) for row in chosen])
    for row in chosen:
        _ranges(ax, row, looks[_family(row["strategy"])])
    ax.set_xlabel("virtual seconds to target")
    ax.set_ylabel("bytes to target")
    ax.grid()
    ax.set_axisbelow(True)

    for position, label in enumerate(called):
        ax.annotate(
            f"{position + 1}  {label}",
            (0, 0),
            xycoords="axes fraction",
            xytext=(-30, -34 - position * LINE_IN * 72),
            textcoords="offset points",
            va="top",
            color=INK,
            fontsize=6.8,
            annotation_clip=False,
        )


def _stairs(ax: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Draws the border of what the front beats: right of a point and above it."""
    if points:
        xs, ys = zip(*points, strict=True)
        ax.step(
            xs,
            ys,
            where="post",
            color=SOFT,
            linewidth=0.9,
            linestyle=(0, (3, 1.5)),
            zorder=2.2,
            gid="front line",
        )


def _ranges(ax: Axes, row: Mapping[Any, Any], look: Look) -> None:
    seconds: Summary = row["seconds"]
    amount: Summary = row["bytes"]
    x = seconds.center
    y = amount.center
    line: dict[str, Any] = {"color": look.color, "linewidth": 0.8, "zorder": 2.6}

    if math.isfinite(seconds.high):
        ax.hlines(y, seconds.low, seconds.high, **line)
        ax.vlines(x, amount.low, amount.high, **line)

    ax.plot(
        [x],
        [y],
        look.marker,
        color=look.color,
        markersize=4.8,
        markeredgecolor=INK,
        gid="front",
        zorder=3,
    )


def _share(axes: Sequence[Axes]) -> None:
    """Gives all panels equal limits: how far a straggler moves points is to be seen."""
    for axis in (0, 1):
        ends = [
            end
            for ax in axes
            for end in (ax.dataLim.intervalx, ax.dataLim.intervaly)[axis]
            if math.isfinite(end)
        ]
        low = min(ends)
        high = max(ends)
        room = max((high / low) ** 0.07, 1.12)
        steps = (1.0, 3.0) if high > 8 * low else (1.0, 2.0, 5.0)

        for ax in axes:
            (ax.set_xlim, ax.set_ylim)[axis](low / room, high * room)
            scale = (ax.xaxis, ax.yaxis)[axis]
            scale.set_major_locator(LogLocator(base=10, subs=steps))
            scale.set_minor_locator(NullLocator())
            unit = ("", "B")[axis]
            scale.set_major_formatter(
                FuncFormatter(lambda value, _, unit=unit: text.tick(value, unit))
            )


def _numbers(ax: Axes, part: pd.DataFrame, on_front: Sequence[str]) -> None:
    """Writes 1, 2, .. below and left of the front's points, where no other point can be.

    Numbers that would stand too near to each other are moved apart.
    """
    spots = centers(part, "seconds", "bytes")
    taken: list[tuple[float, float]] = []

    for position, cell_id in enumerate(on_front):
        x, y = (
            float(value) * 72 / ax.figure.dpi for value in ax.transData.transform(spots[cell_id])
        )
        dx = -5.0
        dy = -5.0

        # Down and to the left there are no other points: whoever stood there would beat this one.
        while any(math.hypot(x + dx - a, y + dy - b) < NEAR_PT for a, b in taken):
            dx = dx - 3.0
            dy = dy - 3.0

        taken.append((x + dx, y + dy))
        far = dx < -8
        ax.annotate(
            str(position + 1),
            spots[cell_id],
            xytext=(dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            color=INK,
            fontsize=7,
            fontweight="bold",
            gid="number",
            arrowprops={"arrowstyle": "-", "color": SOFT, "linewidth": 0.5} if far else None,
        )


def front_names(part: pd.DataFrame, material: Material) -> str:
    """The strategies of the front, fastest first: `asynchronous, k sync and diloco`."""
    name = names(material, short=True)
    return listed([name(one) for one in _series(part, unbeaten(part))])
