"""How names and numbers are written: labels of strategies, units, values rounded to their
interval."""

from __future__ import annotations

import math
from collections.abc import Iterable

from benchsuite.analysis.statistics import Summary
from benchsuite.plan import declared

_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
EMPTY = "–"
_SPREADS = {
    "t interval": "geometric mean and 95 % t interval of the logs (n = 5 to 9)",
    "bootstrap": "median and 95 % bootstrap interval (n ≥ 10)",
}


def label(series: str) -> str:
    """`synchronous/parameter_server lock=none` -> `synchronous, parameter server (lock=none)`."""
    return _named(series, short=False, separator=", ")


def short(series: str) -> str:
    """The same for the axis of a small panel: `sync server`."""
    return _named(series, short=True, separator=" ")


def _named(series: str, *, short: bool, separator: str) -> str:
    """Each member under the label that its file declares."""
    strategy, _, variant = series.partition(" ")
    parts = strategy.split("/")
    named = declared.label_with_topology(parts[0], short=short) if len(parts) == 2 else ""
    named = named or separator.join(declared.labels(part, short=short) for part in parts)
    return f"{named} ({variant})" if variant else named


def slowed(straggler: str) -> str:
    """`worker 0: 4x` -> `worker 0: 4x slower`; nobody -> `no straggler`."""
    return f"{straggler} slower" if straggler else "no straggler"


def workers(count: int) -> str:
    """`1 worker`, `2 workers`."""
    return f"{count} worker" if count == 1 else f"{count} workers"


def number(value: float, *, width: float = 0.0, digits: int = 3) -> str:
    """The value with as many digits as its interval bears (two of the width), at least `digits`
    where width is 0."""
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
    size = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    if width > 0 and math.isfinite(width):
        return min(1 - math.floor(math.log10(width)), size + 2)
    return size


def quantity(summary: Summary, *, scale: float = 1.0) -> str:
    """`5,120 [4,800–5,440]`; `1,310` where exact; `> budget (2 of 3)` for a median that was never
    reached.

    `scale` multiplies the values (1000 for milliseconds of seconds). A finite median with misses
    says so: `9,600 [8,320–> budget (1 of 3)]`.
    """
    center, spread = parts(summary, scale=scale)
    return f"{center} [{spread}]" if spread else center


def parts(summary: Summary, *, scale: float = 1.0) -> tuple[str, str]:
    """Centre and spread of `quantity` apart; the spread is empty where there is none."""
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
    """What centre and spread of these are: `median and range (n < 5)`."""
    kinds = {summary.kind for summary in summaries}
    said = [text for kind, text in _SPREADS.items() if kind in kinds]
    return "; ".join([*said, f"median and range where {'runs missed or ' if said else ''}n < 5"])


def si(value: float, unit: str = "B", digits: int = 3) -> str:
    """Decimal prefixes: `si(101480) == "101 kB"` (k = 1000)."""
    if math.isnan(value):
        return EMPTY
    for factor, name in _SCALES:
        if abs(value) >= factor * (1 - 0.5 * 10**-digits):
            return f"{_significant(value / factor, digits)} {name}{unit}"
    return f"{_significant(value, digits)} {unit}"


def si_quantity(summary: Summary, unit: str = "B") -> str:
    """`quantity` with a decimal prefix chosen by the centre."""
    if summary.n == 0 or not math.isfinite(summary.center):
        return quantity(summary)
    factor, name = prefix(summary.center)
    return f"{quantity(summary, scale=1 / factor)} {name}{unit}"


def prefix(value: float) -> tuple[float, str]:
    """Decimal prefix for a value of this size: (1000.0, "k")."""
    return next(((factor, name) for factor, name in _SCALES if abs(value) >= factor), (1.0, ""))


def tick(value: float, unit: str = "") -> str:
    """Short axis label: 0, 5k, 1.5 MB."""
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
    """`1 run`, `3 runs`."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
