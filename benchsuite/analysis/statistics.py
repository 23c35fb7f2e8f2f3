"""Summaries, ratios, medians with misses, and when two sets may be compared.

No number is printed without n and a spread. The unit is the fresh launch (one value per run), never
the pooled step. How wide a spread may claim to be depends on n: fewer than 5 launches give all
points and their range, called `range`; 5 to 9 a t interval of the logs, around the geometric mean;
from 10 on a percentile bootstrap of the median. A miss (a target that was not reached within the
budget) is infinite: it stays in every median and is printed `> budget (k of n)`, k misses among n
runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Kind = Literal["none", "exact", "range", "t interval", "bootstrap"]

CONFIDENCE = 0.95
FEW = 5  # fewer launches than this carry a range, not an interval
MANY = 10  # from here on a bootstrap
RESAMPLES = 2000


@dataclass(frozen=True)
class Summary:
    """One quantity over n launches. `center` is infinite where at least half of them missed."""

    n: int
    center: float  # the median; the geometric mean where kind is "t interval"
    low: float
    high: float
    kind: Kind
    points: tuple[float, ...] = ()  # in the order given; infinite = a miss

    @property
    def misses(self) -> int:
        """Launches without a finite value."""
        return sum(math.isinf(point) for point in self.points)

    def times(self, factor: float) -> Summary:
        """The same summary in another unit."""
        points = tuple(point * factor for point in self.points)
        return Summary(
            self.n, self.center * factor, self.low * factor, self.high * factor, self.kind, points
        )


@dataclass(frozen=True)
class Comparison:
    """Mann-Whitney of two sets of launches, or why there is none."""

    p: float | None
    smallest_p: float  # the two-sided p that complete separation would give
    verdict: str  # "different", "not told apart", "too few"


def summarize(values: Sequence[float], *, seed: int = 0) -> Summary:
    """Centre and spread of one value per launch.

    Infinities count, NaN is refused: a missing value is left out. `exact` where all n >= 2 values
    are equal: a deterministic quantity has no spread.
    """
    points = tuple(float(value) for value in values)

    if any(math.isnan(point) for point in points):
        raise ValueError(
            "a launch without a value is left out, or infinite if it missed; it is never NaN"
        )

    n = len(points)
    if n == 0:
        return Summary(0, math.nan, math.nan, math.nan, "none")
    center = statistics.median(points)  # infinite as soon as half of the launches missed
    low = min(points)
    high = max(points)
    if n >= 2 and low == high:
        return Summary(n, center, low, high, "exact", points)
    # Logs need positive, finite values: with a miss or a zero there is a range only.
    censored = math.isinf(high)

    if n >= FEW and n < MANY and low > 0 and not censored:
        mean, half = _log_t(points)
        return Summary(
            n, math.exp(mean), math.exp(mean - half), math.exp(mean + half), "t interval", points
        )

    if n >= MANY:
        low, high = bootstrap_median(points, seed=seed)
        return Summary(n, center, low, high, "bootstrap", points)

    return Summary(n, center, low, high, "range", points)


def bootstrap_median(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the median, misses included.

    The same values and seed give the same interval.
    """
    points = np.sort(np.asarray(values, dtype=float))
    draws = np.random.default_rng(seed).integers(0, len(points), size=(RESAMPLES, len(points)))
    middle = np.sort(points[draws], axis=1)
    n = len(points)
    medians = middle[:, n // 2] if n % 2 else (middle[:, n // 2 - 1] + middle[:, n // 2]) / 2
    return _order_interval(medians)


def ratio(
    numerator: Sequence[float], denominator: Sequence[float], *, paired: bool = False, seed: int = 0
) -> Summary:
    """Ratio of medians of two sets of launches (positive, finite), with its spread.

    Fewer than 5 in either set: the range of all ratios (paired: of the n pairs). 5 to 9: t interval
    of the logs around the ratio of geometric means (paired t, or Welch). From 10 on: bootstrap,
    pairs resampled together if `paired`. n is the smaller of the two numbers of launches.
    """
    top = np.asarray(numerator, dtype=float)
    bottom = np.asarray(denominator, dtype=float)

    if paired and len(top) != len(bottom):
        raise ValueError(
            f"paired needs one value per block on both sides, not {len(top)} and {len(bottom)}"
        )

    if not (
        np.all(np.isfinite(top))
        and np.all(np.isfinite(bottom))
        and np.all(top > 0)
        and np.all(bottom > 0)
    ):
        raise ValueError("a ratio needs positive, finite values on both sides")

    n = min(len(top), len(bottom))
    if n == 0:
        return Summary(0, math.nan, math.nan, math.nan, "none")
    center = float(np.median(top) / np.median(bottom))

    if n < FEW:
        ratios = (top / bottom) if paired else np.divide.outer(top, bottom).ravel()
        points = tuple(ratios.tolist()) if paired else ()
        return Summary(n, center, float(ratios.min()), float(ratios.max()), "range", points)

    if n < MANY:
        mean, half = (
            _log_t((top / bottom).tolist()) if paired else _welch(np.log(top), np.log(bottom))
        )
        return Summary(
            n, math.exp(mean), math.exp(mean - half), math.exp(mean + half), "t interval"
        )

    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(top), size=(RESAMPLES, len(top)))
    other = rows if paired else rng.integers(0, len(bottom), size=(RESAMPLES, len(bottom)))
    low, high = _order_interval(np.median(top[rows], axis=1) / np.median(bottom[other], axis=1))
    return Summary(n, center, low, high, "bootstrap")


def compare(first: Sequence[float], second: Sequence[float], *, alpha: float = 0.05) -> Comparison:
    """Two-sided Mann-Whitney test of two sets of launches.

    `too few` where even complete separation could not reach `alpha` (3 against 3: 0.10).
    """
    a = len(first)
    b = len(second)
    smallest = 2 / math.comb(a + b, a) if a and b else 1.0
    if smallest > alpha:
        return Comparison(None, smallest, "too few")
    p = float(stats.mannwhitneyu(first, second, alternative="two-sided").pvalue)
    return Comparison(p, smallest, "different" if p <= alpha else "not told apart")


def lower_share(successes: int, trials: int) -> float:
    """Lower 95 % bound on a share (Clopper and Pearson 1934, one-sided).

    60 of 60 -> 0.951, 57 of 60 -> 0.876.
    """
    return (
        float(stats.beta.ppf(1 - CONFIDENCE, successes, trials - successes + 1))
        if successes
        else 0.0
    )


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The values that a quarter and three quarters of the launches do not pass.

    They are observed ones, so infinities count.
    """
    ordered = sorted(values)
    n = len(ordered)
    return (
        (ordered[math.ceil(n / 4) - 1], ordered[math.ceil(3 * n / 4) - 1])
        if n
        else (math.nan, math.nan)
    )


def _log_t(values: Sequence[float]) -> tuple[float, float]:
    """Mean of the logs and half the width of its t interval."""
    logs = np.log(np.asarray(values, dtype=float))
    n = len(logs)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * logs.std(ddof=1) / math.sqrt(n)
    return float(logs.mean()), float(half)


def _welch(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Difference of means and half the width of its Welch t interval."""
    va = first.var(ddof=1) / len(first)
    vb = second.var(ddof=1) / len(second)
    difference = float(first.mean() - second.mean())
    if va + vb == 0:
        return difference, 0.0
    freedom = (va + vb) ** 2 / (va**2 / (len(first) - 1) + vb**2 / (len(second) - 1))
    return difference, float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(va + vb))


def _order_interval(values: np.ndarray) -> tuple[float, float]:
    """Central interval by order statistics (no interpolation, so infinite values are allowed)."""
    ordered = np.sort(values)
    # No interpolation: between a number and infinity there is no number.
    tail = (1 - CONFIDENCE) / 2
    last = len(ordered) - 1
    return float(ordered[math.floor(tail * last)]), float(ordered[math.ceil((1 - tail) * last)])
