"""What it took to arrive at a target in seconds, samples and bytes, and the front of two of them.

Read from the run files of either clock, so a table of these holds seconds of one clock only. A run
that did not arrive is a miss: infinite in every quantity, kept in the median.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import pandas as pd

from benchsuite.analysis.statistics import Summary, summarize
from benchsuite.results.record import CONTENDED, OVERSUBSCRIBED, Run

QUANTITIES = ("seconds", "samples", "bytes")
GOALS = ("easy", "target", "hard")
TUNED = "per_strategy"
Key = TypeVar("Key", bound=Hashable)


def arrivals(runs: Sequence[Run], cells: pd.DataFrame, *, goal: str = "target") -> pd.DataFrame:
    """One row per cell with runs that state a target, in the order of `cells` (`cells.describe`).

    Adds n, a `Summary` per `QUANTITIES`, base (the series without `tuned`, equal for both
    tunings), slowdown (the largest factor of a slowed worker, else 1), hosts, lr_factors (of
    tuned cells: the chosen ones), flagged (a run was oversubscribed or contended: its wall
    seconds are not compared).
    """
    found: dict[str, list[Run]] = defaultdict(list)

    for run in runs:
        if run.result.get("target"):
            found[run.cell_id].append(run)

    rows = []

    for name in cells.to_dict("records"):
        mine = found.get(name["cell_id"])
        if mine:
            rows.append(
                name | _facts(mine, goal) | {"base": base(str(name["series"]), str(name["tuning"]))}
            )

    added = ["n", *QUANTITIES, "slowdown", "hosts", "lr_factors", "flagged", "base"]
    return pd.DataFrame(rows, columns=[*cells.columns, *added])


def _facts(runs: Sequence[Run], goal: str) -> dict[str, Any]:
    to = [
        (run.cost["time_to"][goal], run.result["samples_to"][goal], run.cost["bytes_to"][goal])
        for run in runs
    ]
    values = [
        [math.inf if each is None else float(each) for each in column]
        for column in zip(*to, strict=True)
    ]
    chosen = [(run.result.get("tuning") or {}).get("lr_factor") for run in runs]
    return dict(zip(QUANTITIES, map(summarize, values), strict=True)) | {
        "n": len(runs),
        "slowdown": max((float(factor) for factor in runs[0].cell.straggler.values()), default=1.0),
        "hosts": runs[0].cell.hosts,
        "lr_factors": tuple(
            dict.fromkeys(float(factor) for factor in chosen if factor is not None)
        ),
        "flagged": any({OVERSUBSCRIBED, CONTENDED} & set(run.flags) for run in runs),
    }


def base(series: str, tuning: str) -> str:
    """The series under its untuned name, which a tuned and an untuned cell share."""
    return series.removesuffix("tuned").strip() if tuning == TUNED else series


def front(points: Mapping[Key, tuple[float, float]]) -> list[Key]:
    """The keys of points that no other beats, fewest of the first quantity first.

    Fewer is better in both. A point is beaten by one that is nowhere worse and somewhere better;
    equal points do not beat each other. One with an infinite quantity (a miss) never belongs.
    """
    finite = {key: point for key, point in points.items() if all(map(math.isfinite, point))}
    unbeaten = [
        key
        for key, point in finite.items()
        if not any(_beats(other, point) for other in finite.values())
    ]
    return sorted(unbeaten, key=lambda key: finite[key])


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def centers(table: pd.DataFrame, first: str, second: str) -> dict[str, tuple[float, float]]:
    """Cell id -> the medians of two quantities."""
    pairs: dict[str, tuple[float, float]] = {}
    for cell_id, one, other in zip(table["cell_id"], table[first], table[second], strict=True):
        a: Summary = one
        b: Summary = other
        pairs[str(cell_id)] = (a.center, b.center)
    return pairs
