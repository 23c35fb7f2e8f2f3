"""The figures of `benchsuite selfcheck` and their verdicts: pass, miss or too noisy.

The unit is the fresh launch (or the start of a process), and a bar is compared with the median over
launches. A contended machine gives no verdict against the suite: there only an interval that lies
wholly on the right side of the bar is a pass, and all else is `too noisy`. All functions are pure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchsuite.analysis.statistics import summarize
from benchsuite.measure.load import CONTENDED_ABOVE

Verdict = Literal["pass", "miss", "too noisy", "not run", "-"]
EXIT_CODES = {"miss": 1, "too noisy": 3}  # of the command line; all other verdicts give 0


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured quantity: a value per fresh launch, in the order in which they were taken."""

    item: str
    quantity: str
    unit: str
    points: Sequence[float] = ()
    bar: float | None = None  # None: the figure is information only
    better: Literal["lower", "higher"] = "lower"
    foreign: float | None = None  # the share of the cores that others used meanwhile
    note: str = ""  # what the figure is made of, or why nothing was run

    @property
    def contended(self) -> bool:
        """Whether other processes used more than 5 % of the cores meanwhile."""
        return self.foreign is not None and self.foreign > CONTENDED_ABOVE

    @property
    def verdict(self) -> Verdict:
        """What `judge` says; "-" where there is no bar, "not run" where there is no value."""
        if not self.points:
            return "not run"
        if self.bar is None:
            return "-"
        return judge(self.points, self.bar, better=self.better, contended=self.contended)

    def to_json(self) -> dict[str, Any]:
        """All fields, with the median, the interval and the verdict."""
        document: dict[str, Any] = {
            name: value for name, value in vars(self).items() if name != "points"
        }
        document |= {"points": list(self.points), "n": len(self.points)}
        document |= {"verdict": self.verdict, "contended": self.contended}
        if not self.points:
            return document | {"median": None, "low": None, "high": None, "interval": "none"}
        low, high, kind = interval(self.points)
        return document | {
            "median": statistics.median(self.points),
            "low": low,
            "high": high,
            "interval": kind,
        }


def interval(points: Sequence[float]) -> tuple[float, float, str]:
    """(low, high, which kind): a 95 % interval from 5 launches on, the range of fewer."""
    summary = summarize(points)
    return summary.low, summary.high, summary.kind


def judge(points: Sequence[float], bar: float, *, better: str, contended: bool = False) -> Verdict:
    """Says what one value per launch means for a bar.

    On a quiet machine the median decides between `pass` and `miss`. On a contended one the answer
    is `pass` where the whole interval is on the right side of the bar, and `too noisy` elsewhere.
    """
    if not points or any(math.isnan(point) for point in points):
        raise ValueError("a verdict needs values, none of them NaN")
    low, high, _ = interval(points)
    median = statistics.median(points)
    meets = median <= bar if better == "lower" else median >= bar
    if not contended:
        return "pass" if meets else "miss"
    clears = high <= bar if better == "lower" else low >= bar
    return "pass" if meets and clears else "too noisy"


def exit_code(verdicts: Sequence[str]) -> int:
    """1 where a bar is missed, else 3 where a verdict was too noisy, else 0."""
    codes = [EXIT_CODES.get(verdict, 0) for verdict in verdicts]
    return 1 if 1 in codes else max(codes, default=0)
