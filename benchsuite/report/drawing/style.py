"""How each strategy looks, the same in every figure, and the theme of all figures.

The theme sets the paper's font sizes, a palette for colour-blind readers, and embedded fonts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import seaborn as sns

from benchsuite.plan import declared
from benchsuite.report.words import labels

PALETTE: tuple[str, ...] = tuple(sns.color_palette("colorblind").as_hex())
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*")
SOLID: tuple[float, ...] = ()
DASHES: tuple[tuple[float, ...], ...] = (
    SOLID,
    (4, 1.6),
    (1.4, 1.2),
    (6, 1.4, 1.4, 1.4),
    (2.6, 1.4),
)

# What is no form of parallelism but stands among them: colour and marks of one and of several.
_FORMS = {"agreeing less often": (PALETTE[4], "*", "*")}
# Places of marks: of a compressed form, and of who declares no order.
_COMPRESSED = 11
_UNKNOWN = 12
_FREE = tuple(PALETTE[index] for index in (1, 4, 5, 8, 6))
# Parts of a rank's time: colour and label. Apart from the strategies' colours; ordered from work to
# waiting.
PARTS = {
    "compute": ("#35506b", "forward + backward"),
    "data": ("#8fa6bd", "data"),
    "update": ("#c9d3de", "update"),
    "blocked": ("#e9b44c", "blocked in communication"),
    "idle": ("#efece6", "idle"),
}
INK = "#22272e"
SOFT = "#6b7280"
GRID = "#e6e8eb"

WIDE_IN = 7.0
NARROW_IN = 3.33


@dataclass(frozen=True)
class Look:
    """How one series is drawn everywhere."""

    color: str
    marker: str
    dash: tuple[float, ...]
    label: str
    joined: bool = True  # whether a line joins its marks

    @property
    def line(self) -> Any:
        """matplotlib's `linestyle`."""
        if not self.joined:
            return "none"
        return (0, self.dash) if self.dash else "-"


def looks(series: Iterable[str]) -> dict[str, Look]:
    """Gives every series a colour, a mark and dashes.

    Known strategies keep theirs in every plan, other series of a known synchronisation its colour,
    and new ones get free colours in order. A tuned series looks like the one that it was tuned
    from, with other dashes.
    """
    given: dict[str, tuple[str, int, int]] = {}
    free = itertools.cycle(_FREE)
    used: Counter[str] = Counter()

    for name in sorted(set(series)):
        plain = name.removesuffix(" tuned")
        sync = name.partition("/")[0]
        says = _strategy(sync)
        topology = plain.removeprefix(f"{sync}/")

        if topology in says.looks:
            color, marker, dash = says.looks[topology]
            given[name] = (PALETTE[color], marker, dash)
        elif plain in given:
            given[name] = given[plain]
        elif says.colour != "" and len(says.looks) < 2:
            place = _mark(says) + 3 * used[sync]
            given[name] = (_colour(says.colour), place, place)
        else:
            place = 5 + used[sync]
            given[name] = (next(free), place, used[sync])

        used[sync] += 1

        if plain != name:
            color_of, marker, dash = given[name]
            given[name] = (color_of, marker, dash + 1)

    return {
        name: Look(
            color, MARKERS[marker % len(MARKERS)], DASHES[dash % len(DASHES)], labels.label(name)
        )
        for name, (color, marker, dash) in given.items()
    }


def families(syncs: Iterable[str]) -> dict[str, Look]:
    """How points look where only the synchronisation is told apart, the same in every plan.

    Keys are a synchronisation or `sync compressed`; unknown ones get free colours.
    """
    free = itertools.cycle(_FREE)
    found = {}

    for name in dict.fromkeys(syncs):
        sync = name.removesuffix(" compressed")
        says = _strategy(sync)
        colour = says.colour if sync == name else says.compressed_colour
        color = _colour(colour) if colour != "" else next(free)
        mark = _UNKNOWN if colour == "" else _mark(says) if sync == name else _COMPRESSED
        marker = MARKERS[mark % len(MARKERS)]
        found[name] = Look(color, marker, SOLID, labels.label(name), joined=False)

    return found


def _strategy(name: str) -> declared.Strategy:
    says = declared.by_stem("sync", name)
    return says if isinstance(says, declared.Strategy) else declared.Strategy()


def _colour(declared_colour: int | str) -> str:
    """A declared colour as `#rrggbb`: a number is a place in the palette."""
    return PALETTE[declared_colour] if isinstance(declared_colour, int) else declared_colour


def _mark(says: declared.Strategy) -> int:
    """The mark goes by the order that a strategy declares."""
    return _UNKNOWN if says.order == declared.LAST else says.order


def forms(kinds: Iterable[str]) -> dict[str, Look]:
    """How the points of forms of parallelism look: `pipeline`, `2 × pipeline`.

    One replica and several of a form share a colour and differ in the mark; unknown forms get free
    colours.
    """
    wanted = set(kinds)
    known: dict[str, tuple[str, str, str]] = {}

    for name in (*declared.members("parallel"), *sorted(wanted)):
        says = declared.by_stem("parallel", name)
        if isinstance(says, declared.Parallel) and says.marks:
            known[name] = (_colour(says.colour), says.marks[0], says.marks[-1])

    known |= _FORMS
    free = dict(
        zip(
            sorted({kind.rpartition("× ")[2] for kind in wanted} - set(known)),
            itertools.cycle(_FREE),
        )
    )
    found = {}

    for form in (*known, *free):
        color, one, several = known.get(form) or (free[form], "<", ">")
        for kind in sorted((kind for kind in wanted if kind.rpartition("× ")[2] == form), key=len):
            found[kind] = Look(color, several if kind != form else one, SOLID, kind, joined=False)

    return found


def levels(labels: Sequence[str]) -> list[Look]:
    """Looks of what is ordered (1, 2, 4 times slower), from light to dark.

    No strategy has these colours.
    """
    colors = sns.color_palette("flare", max(len(labels), 2)).as_hex()
    return [
        Look(colors[i], MARKERS[i % len(MARKERS)], SOLID, label) for i, label in enumerate(labels)
    ]


def theme() -> dict[str, Any]:
    """Settings for `matplotlib.rc_context`.

    Letters of 7 to 8 pt, fonts embedded as TrueType, and ids that do not change between renderings.
    """
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


def marker_face(look: Look, *, hollow: bool) -> dict[str, Any]:
    """The face of a mark: hollow where a flag forbids a claim.

    The gid lets a reader of the SVG, and a test, tell hollow from filled.
    """
    return {
        "markerfacecolor": "white" if hollow else look.color,
        "gid": "hollow" if hollow else "filled",
    }
