"""Figures on a grid given in inches, saved as PDF, SVG and PNG.

A saved file stays the same, byte for byte, as long as the data do. Every figure has a legend strip
on top, for papers. The page leaves that strip out (its legend is HTML) and can cut the picture into
its panels, so that on a phone they stand below each other at a readable size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchsuite.report.drawing.style import INK, Look

POINTS_PER_INCH = 72
PNG_DPI = 200
LEGEND_ROW_IN = 0.17
Entry = Look | tuple[str, str]  # how a line looks, or (colour, label) of an area
Box = tuple[
    float, float, float, float
]  # x, y, width, height in points, y downwards: an SVG viewBox


@dataclass
class Drawing:
    """One figure, ready to be saved."""

    name: str
    figure: Figure
    caption: str
    cell_ids: list[str]
    legend: Sequence[Entry]
    whole: Box  # without the legend strip
    panels: list[Box] = field(default_factory=list)
    alt: str = ""
    labels: Box | None = (
        None  # names of rows, which stand left of every panel where the picture is cut
    )


@dataclass(frozen=True)
class Grid:
    """The axes of a figure, and the rectangle that each column and each cell of the grid takes."""

    figure: Figure
    axes: list[list[Axes]]  # rows of columns
    whole: Box
    columns: list[Box]
    cells: list[list[Box]]
    labels: Box | None = None


@dataclass(frozen=True)
class Margins:
    """Inches around each single axes, where its labels stand.

    `between` takes the place of `bottom` in all rows but the last.
    """

    left: float = 0.56
    right: float = 0.1
    top: float = 0.22
    bottom: float = 0.36
    between: float = 0.36


def grid(
    rows: Sequence[float],
    columns: int,
    *,
    width: float,
    legend: Sequence[Entry],
    margins: Margins | None = None,
    labels: float = 0.0,
) -> Grid:
    """Makes a figure `width` inches wide with axes in `columns` equal columns.

    `rows` are the heights of the axes in inches. `legend` is what `Drawing.legend` will hold: the
    strip on top is made high enough for it. `labels` are inches on the left for what belongs to all
    columns.
    """
    m = margins or Margins()
    strip = LEGEND_ROW_IN * _legend_rows(legend, width)[0] + 0.06
    below = [*[m.between] * (len(rows) - 1), m.bottom]
    height = strip + sum(row + m.top + under for row, under in zip(rows, below, strict=True))
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    cell_width = (width - labels) / columns
    axes = []
    cells = []
    top = strip

    for row, under in zip(rows, below, strict=True):
        line = []
        boxes = []

        for column in range(columns):
            left = labels + column * cell_width + m.left
            bottom = height - (top + m.top + row)
            size = (cell_width - m.left - m.right) / width, row / height
            line.append(figure.add_axes((left / width, bottom / height, *size)))
            boxes.append(_box(labels + column * cell_width, top, cell_width, m.top + row + under))

        axes.append(line)
        cells.append(boxes)
        top += m.top + row + under

    column_boxes = [
        _box(labels + c * cell_width, strip, cell_width, height - strip) for c in range(columns)
    ]
    beside = _box(0, strip, labels, height - strip) if labels else None
    return Grid(figure, axes, _box(0, strip, width, height - strip), column_boxes, cells, beside)


def _legend_rows(entries: Sequence[Entry], width: float) -> tuple[int, int]:
    """Rows and columns of the legend strip: as many columns as fit, by the length of the labels."""
    lengths = [len(entry.label if isinstance(entry, Look) else entry[1]) for entry in entries]
    if not lengths:
        return 0, 1
    columns = len(lengths)

    while columns > 1:
        # Inches: about 0.06 per letter at 7 pt, and 0.42 for the mark and the gap of a column.
        widest = sum(max(lengths[start::columns]) * 0.06 + 0.42 for start in range(columns))
        if widest <= width:
            break
        columns -= 1

    return -(-len(lengths) // columns), columns


def _box(x: float, y: float, width: float, height: float) -> Box:
    return tuple(round(value * POINTS_PER_INCH, 2) for value in (x, y, width, height))  # type: ignore[return-value]


def add_legend(drawing: Drawing) -> None:
    """Draws the legend strip that the saved files have on top."""
    handles = []

    for entry in drawing.legend:
        if isinstance(entry, Look):
            look = {
                "color": entry.color,
                "marker": entry.marker,
                "linestyle": entry.line,
                "label": entry.label,
            }
            handles.append(Line2D([], [], **look))
        else:
            color, label = entry
            handles.append(
                Line2D([], [], color=color, marker="s", linestyle="none", markersize=5, label=label)
            )

    if handles:
        drawing.figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.0, 1.0),
            frameon=False,
            ncols=_legend_rows(drawing.legend, float(drawing.figure.get_figwidth()))[1],
            borderaxespad=0.2,
            handlelength=2.2,
            columnspacing=1.2,
            handletextpad=0.5,
            labelcolor=INK,
        )


def save(drawing: Drawing, folder: Path, *, epoch: int) -> str:
    """Writes name.pdf, name.svg and name.png under `folder` and returns the SVG text.

    `epoch`: the seconds since 1970 that are stamped into the PDF.
    """
    add_legend(drawing)
    figure = drawing.figure
    when = datetime.fromtimestamp(epoch, UTC)
    stamp = {"CreationDate": when, "ModDate": when, "Creator": "benchsuite", "Producer": None}
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "benchsuite"})
    svg = buffer.getvalue().decode()
    (folder / f"{drawing.name}.svg").write_text(svg, encoding="utf-8")
    figure.savefig(folder / f"{drawing.name}.pdf", format="pdf", metadata=stamp)
    figure.savefig(
        folder / f"{drawing.name}.png",
        format="png",
        dpi=PNG_DPI,
        metadata={"Software": "benchsuite"},
    )
    return svg


def inline(svg: str, prefix: str) -> str:
    """The inner part of an SVG file, to stand in an HTML page.

    The prologue and the metadata are left out, and every id that something refers to begins with
    `prefix`, so that two figures on a page have no id in common.
    """
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 : body.rindex("</svg>")]
    # matplotlib states its version there: the page would change with it.
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    referred = set(re.findall(r"(?:xlink:href=\"#|url\(#)([^\")]+)", body))
    body = re.sub(
        r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in referred else "", body
    )
    body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", body)
    return re.sub(r"<!--.*?-->\n?", "", body, flags=re.DOTALL).strip()
