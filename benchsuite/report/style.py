"""One look per strategy, the same in every figure, and the theme: paper size, colour-blind palette, embedded fonts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import seaborn as sns

from benchsuite.report import words

PALETTE: tuple[str, ...] = tuple(sns.color_palette("colorblind").as_hex())
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*")
SOLID: tuple[float, ...] = ()
DASHES: tuple[tuple[float, ...], ...] = (SOLID, (4, 1.6), (1.4, 1.2), (6, 1.4, 1.4, 1.4), (2.6, 1.4))

# Strategies of every quick page: (palette index, marker index, dash index). The others take free ones, in order.
_FIXED = {
    "synchronous/parameter_server": (2, 1, 1),
    "synchronous/ring": (0, 0, 0),
    "synchronous/native": (9, 2, 2),
    "asynchronous/parameter_server": (3, 3, 0),
    "ddp/native": (7, 4, 2),
}
# Parts of a rank's time: colour and label. Apart from the strategies' colours; ordered from work to waiting.
PARTS = {
    "compute": ("#35506b", "forward + backward"),
    "data": ("#8fa6bd", "data"),
    "update": ("#c9d3de", "update"),
    "blocked": ("#e9b44c", "blocked in communication"),
    "idle": ("#efece6", "idle"),
}
INK, SOFT, GRID = "#22272e", "#6b7280", "#e6e8eb"

WIDE_IN, NARROW_IN = 7.0, 3.33


@dataclass(frozen=True)
class Look:
    """How one series is drawn everywhere."""

    color: str
    marker: str
    dash: tuple[float, ...]
    label: str

    @property
    def line(self) -> Any:
        """matplotlib's `linestyle`."""
        return (0, self.dash) if self.dash else "-"


def looks(series: Iterable[str]) -> dict[str, Look]:
    """Series name -> look. Known strategies keep theirs; new ones get free colours in alphabetical order."""
    names = sorted(set(series))
    given: dict[str, tuple[int, int, int]] = {name: _FIXED[name] for name in names if name in _FIXED}
    used = {color for color, _, _ in _FIXED.values()}
    free = [index for index in (1, 4, 5, 8, 6) if index not in used] or [0]
    for position, name in enumerate(name for name in names if name not in given):
        given[name] = (free[position % len(free)], (5 + position) % len(MARKERS), position % len(DASHES))
    return {
        name: Look(PALETTE[color], MARKERS[marker], DASHES[dash], words.label(name))
        for name, (color, marker, dash) in given.items()
    }


def theme() -> dict[str, Any]:
    """Settings for `matplotlib.rc_context`: 7 to 8 pt, fonts embedded as TrueType, ids that do not change."""
    return {
        **sns.axes_style("ticks"),
        **sns.plotting_context("paper"),
        "font.family": ["sans-serif"],
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 7.5,
        "axes.titlesize": 7.5,
        "axes.labelsize": 7.5,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "axes.linewidth": 0.6,
        "axes.edgecolor": SOFT,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.major.size": 2.5,
        "ytick.major.size": 2.5,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.3,
        "lines.markersize": 3.6,
        "lines.markeredgewidth": 0.9,
        "hatch.linewidth": 0.5,
        "pdf.fonttype": 42,
        "svg.fonttype": "none",
        "svg.hashsalt": "benchsuite",
        "path.simplify": False,
    }
