"""Memory per rank against bytes per step, a panel per workload and number of ranks.

Numbered and named is the front: forms that nothing beats on both. A form that sends more stands on
it only if it keeps clearly less: ranges apart, and by more than code may take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from benchsuite.analysis.parallel import CODE_BYTES, apart
from benchsuite.analysis.statistics import Summary
from benchsuite.report import text
from benchsuite.report.drawing.canvas import Drawing, Margins, grid
from benchsuite.report.drawing.style import INK, SOFT, WIDE_IN, Look, forms
from benchsuite.report.kinds import Kind
from benchsuite.report.material import Material
from benchsuite.report.spec import FigureSpec
from benchsuite.report.tables.parallel_table import MIB, SELDOM, compared, tied

KIND = Kind(
    title="What does a rank keep, and what is sent?",
    clock="wall",
    place=120,
    not_where_all={"model_parallel": 1},
)

LINE_IN = 0.135  # a line of the list of names below a panel
NEAR_PT = 7.5  # numbers nearer to each other than this are moved apart


def draw(spec: FigureSpec, material: Material) -> list[Drawing]:
    """One drawing: a row of panels per workload, a column per number of ranks."""
    everything = compared(material)
    table = material.of(everything, spec) if len(everything) else everything
    drawn = table[[_has_place(row) for row in table.to_dict("records")]] if len(table) else table
    if drawn.empty:
        return []
    workloads = list(dict.fromkeys(drawn["workload"]))
    ranks = sorted(set(drawn["ranks"]))
    looks = forms(drawn["kind"])
    parts = {
        (str(w), int(str(r))): part
        for (w, r), part in drawn.groupby(["workload", "ranks"], sort=False)
    }
    fronts = {key: front(part) for key, part in parts.items()}
    longest = max(map(len, fronts.values()))
    below = 0.5 + LINE_IN * longest
    margins = Margins(left=0.6, right=0.14, top=0.26, bottom=below, between=below)
    layout = grid(
        [1.55] * len(workloads),
        len(ranks),
        width=WIDE_IN,
        legend=list(looks.values()),
        margins=margins,
    )
    boxes = []

    for line, cells, workload in zip(layout.axes, layout.cells, workloads, strict=True):
        shown = [
            (ax, box, (workload, count)) for ax, box, count in zip(line, cells, ranks, strict=True)
        ]

        for ax, box, key in shown:
            if key not in parts:
                ax.set_visible(False)
                continue
            boxes.append(box)
            _panel(ax, parts[key], looks)
            ax.set_title(f"{workload}, {key[1]} ranks", loc="left", fontweight="bold")
        used = [ax for ax, _, key in shown if key in parts]
        alone = table[(table["workload"] == workload) & (table["ranks"] == 1)]
        _share(used, alone)
        for ax, _, key in shown:
            if key in parts:
                _front(ax, parts[key], fronts[key])
    ids = [str(cell_id) for cell_id in table["cell_id"]]
    caption = f"{_meaning(drawn)} {_missing(table, drawn)}{material.provenance(ids)}"
    return [
        Drawing(
            spec.name,
            layout.figure,
            caption,
            ids,
            list(looks.values()),
            layout.whole,
            boxes,
            alt="memory of the fullest rank against bytes per step of every form of parallelism",
        )
    ]


def front(part: pd.DataFrame) -> list[list[str]]:
    """The front of a panel: groups of cell ids that cannot be told apart, fewest bytes first.

    A form stands on it that keeps clearly less than all that send less; of those that send equally
    much the one that keeps least and what is not apart from it. Only forms that agree in every step
    count.
    """
    rows = part[part["every_step"]]
    found: list[list[str]] = []
    least: Summary | None = None

    for _, group in rows.groupby(rows["payload_bytes_per_step"].map(lambda s: s.center)):
        memory = dict(zip(group["cell_id"], group["peak_model_bytes"], strict=True))
        alike = tied(memory, "peak_model_bytes")
        here = memory[alike[0]]

        if least is None or (here.center < least.center and apart(here, least, margin=CODE_BYTES)):
            found.append(alike)
            least = here

    return found


def _has_place(row: Mapping[Any, Any]) -> bool:
    """Whether both numbers are known, and the bytes are more than 0 for a logarithmic axis."""
    return bool(
        row["ranks"] > 1 and row["peak_model_bytes"].n and row["payload_bytes_per_step"].center > 0
    )


def _panel(ax: Axes, part: pd.DataFrame, looks: Mapping[str, Look]) -> None:
    ax.set_xscale("log")

    for row in part.to_dict("records"):
        memory: Summary = row["peak_model_bytes"]
        x = row["payload_bytes_per_step"].center
        look = looks[row["kind"]]
        ax.vlines(x, memory.low / MIB, memory.high / MIB, color=look.color, linewidth=0.8, zorder=2)
        size = 6.5 if look.marker == "*" else 4.6
        ax.plot(
            [x],
            [memory.center / MIB],
            look.marker,
            color=look.color,
            markersize=size,
            markeredgecolor="white",
            markeredgewidth=0.5,
            gid=row["kind"],
            zorder=3,
        )

    ax.set_xlabel("bytes per step, all ranks")
    ax.set_ylabel("MiB, fullest rank")
    ax.grid()
    ax.set_axisbelow(True)


def _share(axes: Sequence[Axes], alone: pd.DataFrame) -> None:
    """Gives a row of panels equal limits, and draws a line where one rank alone stands."""
    ends = [end for ax in axes for end in ax.dataLim.intervalx if math.isfinite(end)]
    single: Summary | None = next((each for each in alone["peak_model_bytes"] if each.n), None)
    tops = [float(ax.dataLim.y1) for ax in axes] + ([single.high / MIB] if single else [])
    room = max((max(ends) / min(ends)) ** 0.08, 1.2)
    decades = math.log10(max(ends) / min(ends))

    for ax in axes:
        ax.set_xlim(min(ends) / room, max(ends) * room)
        ax.set_ylim(0, max(tops) * 1.14)
        ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0,) if decades > 2 else (1.0, 3.0)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text.tick(value, "B")))
        ax.yaxis.set_major_locator(MaxNLocator(5))

        if single:
            height = single.center / MIB
            ax.axhline(
                height,
                color=SOFT,
                linewidth=0.8,
                linestyle=(0, (1, 1.5)),
                zorder=1.5,
                gid="one rank",
            )
            ax.annotate(
                "one rank alone",
                (1, height),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                xytext=(-2, 1),
                textcoords="offset points",
                color=SOFT,
                fontsize=6.5,
            )


def _front(ax: Axes, part: pd.DataFrame, groups: Sequence[Sequence[str]]) -> None:
    """Writes 1, 2, .. left of the front's points, and what they are called below the panel."""
    rows = {row["cell_id"]: row for row in part.to_dict("records")}
    taken: list[tuple[float, float]] = []

    for position, group in enumerate(groups):
        row = rows[group[0]]
        spot = row["payload_bytes_per_step"].center, row["peak_model_bytes"].center / MIB
        x, y = (float(value) * 72 / ax.figure.dpi for value in ax.transData.transform(spot))
        dx = -5.5
        dy = -5.5
        while any(math.hypot(x + dx - a, y + dy - b) < NEAR_PT for a, b in taken):
            dx -= 5.0
        taken.append((x + dx, y + dy))
        ax.annotate(
            str(position + 1),
            spot,
            xytext=(dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            color=INK,
            fontsize=7,
            fontweight="bold",
            gid="number",
        )
        others = len(group) - 1
        alike = f" (and {text.count_of(others, 'other')} alike)" if others else ""
        ax.annotate(
            f"{position + 1}:  {row['label']}{alike}",
            (0, 0),
            xycoords="axes fraction",
            xytext=(-30, -34 - position * LINE_IN * 72),
            textcoords="offset points",
            va="top",
            color=INK,
            fontsize=6.8,
            annotation_clip=False,
        )


def _meaning(drawn: pd.DataFrame) -> str:
    seldom = (
        " What agrees less often trains another way and is not on it."
        if SELDOM in set(drawn["kind"])
        else ""
    )
    return (
        "Memory: highest resident set of building and training minus what was resident before, the "
        f"fullest rank of each run; mark and bar: {text.spreads(drawn['peak_model_bytes'])}. "
        "Several marks of one kind: its schedules, micro-batches or topologies. Numbered: the "
        "front; what sends more than another is on it only if it keeps clearly less, ranges apart "
        f"by more than {CODE_BYTES // MIB} MiB, which code alone may take.{seldom}"
    )


def _missing(table: pd.DataFrame, drawn: pd.DataFrame) -> str:
    """Names the forms that have no place on the picture, and says why."""
    left = table[(table["ranks"] > 1) & ~table["cell_id"].isin(set(drawn["cell_id"]))]
    if left.empty:
        return ""
    names = [
        f"{row['workload']} {row['label']} on {row['ranks']} ranks"
        for row in left.to_dict("records")
    ]
    return f"Not on the picture, without an ok run or its bytes: {', '.join(names)}. "
