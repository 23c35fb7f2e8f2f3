"""How text is printed: one aligned table, and one way to write each kind of number.

Nothing heavy is imported here, since every command prints with it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchsuite.analysis.statistics import Summary

_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
EMPTY = "–"
_SPREADS = {
    "t interval": "geometric mean and 95 % t interval of the logs (n = 5 to 9)",
    "bootstrap": "median and 95 % bootstrap interval (n ≥ 10)",
}


def aligned(
    rows: Sequence[Sequence[str]], *, right: Collection[int] = (), indent: int = 0
) -> list[str]:
    """One line per row, each column as wide as its widest field; `right`: columns set to the right.

    Two blanks stand between columns, none at the end of a line.
    """
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []

    for row in rows:
        fields = []
        for column, (field, width) in enumerate(zip(row, widths, strict=True)):
            fields.append(field.rjust(width) if column in right else field.ljust(width))
        lines.append((" " * indent + "  ".join(fields)).rstrip())

    return lines


def number(value: float, *, width: float = 0.0, digits: int = 3) -> str:
    """The value with as many digits as its interval bears: two digits of the width.

    Where `width` is 0, at least `digits` digits.
    """
    if math.isnan(value):
        return EMPTY
    if math.isinf(value):
        return "> budget"
    decimals = _decimals(value, width, digits)
    rounded = round(value, decimals)
    return f"{rounded:,.{max(decimals, 0)}f}"


def _decimals(value: float, width: float, digits: int) -> int:
    if value == int(value) and width == 0 and abs(value) < 1e7:
        return 0
    # Decimals that show `digits` significant digits; an interval may ask for fewer, or 2 more.
    size = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    if width > 0 and math.isfinite(width):
        return min(1 - math.floor(math.log10(width)), size + 2)
    return size


def quantity(summary: Summary, *, scale: float = 1.0) -> str:
    """A summary as text: `5,120 [4,800–5,440]`, or `1,310` where it is exact.

    A median that was never reached is `> budget (2 of 3)`. A finite median with misses says so:
    `9,600 [8,320–> budget (1 of 3)]`. `scale` multiplies the values (1000 for milliseconds of
    seconds).
    """
    center, spread = parts(summary, scale=scale)
    return f"{center} [{spread}]" if spread else center


def parts(summary: Summary, *, scale: float = 1.0) -> tuple[str, str]:
    """Centre and spread of `quantity`, apart; the spread is empty where there is none."""
    if summary.n == 0:
        return EMPTY, ""
    missed = f"> budget ({summary.misses} of {summary.n})"
    if math.isinf(summary.center):
        return missed, ""
    low = summary.low * scale
    high = summary.high * scale
    ends = [
        value for value in (low, high, *(p * scale for p in summary.points)) if math.isfinite(value)
    ]
    width = max(ends) - min(ends)
    center = number(summary.center * scale, width=width)
    if summary.kind == "exact" or summary.n == 1:
        return center, ""
    top = missed if math.isinf(high) else number(high, width=width)
    return center, f"{number(low, width=width)}–{top}"


def spreads(summaries: Iterable[Summary]) -> str:
    """What centre and spread of these summaries are: `median and range where n < 5`."""
    kinds = {summary.kind for summary in summaries}
    said = [text for kind, text in _SPREADS.items() if kind in kinds]
    return "; ".join([*said, f"median and range where {'runs missed or ' if said else ''}n < 5"])


def si(value: float, unit: str = "B", digits: int = 3) -> str:
    """The value with a decimal prefix (k = 1000): `si(101480) == "101 kB"`."""
    if math.isnan(value):
        return EMPTY

    for factor, name in _SCALES:
        # 999,999 is printed as 1 M: what rounds up to the next prefix takes it.
        if abs(value) >= factor * (1 - 0.5 * 10**-digits):
            return f"{_significant(value / factor, digits)} {name}{unit}"

    return f"{_significant(value, digits)} {unit}"


def si_quantity(summary: Summary, unit: str = "B") -> str:
    """`quantity` in bytes or another unit, with a decimal prefix chosen by the centre."""
    if summary.n == 0 or not math.isfinite(summary.center):
        return quantity(summary)
    factor, name = prefix(summary.center)
    return f"{quantity(summary, scale=1 / factor)} {name}{unit}"


def prefix(value: float) -> tuple[float, str]:
    """The decimal prefix for a value of this size: (1000.0, "k")."""
    return next(((factor, name) for factor, name in _SCALES if abs(value) >= factor), (1.0, ""))


def tick(value: float, unit: str = "") -> str:
    """A short label for a tick of an axis: `0`, `5k`, `1.5 MB`."""
    if value == 0:
        return "0"
    text = si(value, unit).strip()
    return text if unit else text.replace(" ", "")


def _significant(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def count_of(n: int, what: str) -> str:
    """A number and what is counted: `1 run`, `3 runs`."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def percent(share: float, *, digits: int = 0) -> str:
    """A share in percent: `97 %`; with `digits` significant digits: `97.5 %`."""
    return f"{100 * share:.{digits}g} %" if digits else f"{100 * share:.0f} %"


def at_least(share: float) -> str:
    """A lower bound, `97.5 %`: rounded down, since a bound does not become larger by rounding."""
    return f"{math.floor(1000 * share + 1e-9) / 10:g} %"


def plain(value: float, *, decimals: int = 3) -> str:
    """About three digits: 0.123, 1.23, 12.3, 123; at most `decimals` behind the point."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    fitting = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1
    return f"{value:.{min(fitting, decimals)}f}"


def binary(count: float) -> str:
    """Bytes by powers of 1024: `812 B`, `4.0 KiB`, `1.5 MiB`, `2.00 GiB`."""
    for unit, size, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count} B"


def duration(seconds: float | None) -> str:
    """A time for people: `unknown`, `42 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds is None:
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
