"""How long a message of so many bytes takes: a piecewise alpha-beta fit, and its errors.

Inside a segment a message takes alpha + beta x bytes, both at least 0. Segments are few, each has
at least three sizes, and they need not meet: a library changes its protocol at some size. The fit
minimises the sum of |log(fit / measured)|, so that small messages count as much as large ones and
one slow launch does not bend a line. A rate enters as beta = max(own beta, 8 / (payload share x
rate)): what a host can copy, or what the link carries. Errors are of sizes and rates that a fit has
not seen. Pure functions of numbers; numpy only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_SEGMENTS = 3
SIZES_PER_SEGMENT = 3
FINE_ENOUGH = 0.01  # mean |log error|: below it a kink is not worth a segment
NEAR = 4.0  # sizes within this factor of a message tell how wrong the fit is about it
BITS_PER_MBIT = 1e6

Points = Sequence[tuple[float, float]]  # (bytes, seconds), several per size
_Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Link:
    """alpha: seconds per message; beta: seconds per byte."""

    alpha_s: float
    beta_s_per_byte: float

    @property
    def mbit(self) -> float:
        """Rate in 10^6 bits per second; infinite where a byte costs nothing."""
        return math.inf if self.beta_s_per_byte == 0 else 8 / self.beta_s_per_byte / BITS_PER_MBIT

    def seconds(self, num_bytes: float) -> float:
        """Seconds that a message of this size takes."""
        return self.alpha_s + self.beta_s_per_byte * num_bytes

    def shaped(self, mbit: float | None, payload_share: float = 1.0) -> Link:
        """The same hosts on a link of this rate, of which headers leave `payload_share`."""
        if mbit is None:
            return self
        return Link(
            self.alpha_s, max(self.beta_s_per_byte, 8 / (payload_share * mbit * BITS_PER_MBIT))
        )


@dataclass(frozen=True)
class Segment:
    """A link that holds for messages up to `high_bytes` (exclusive; infinite for the last)."""

    high_bytes: float
    link: Link


@dataclass(frozen=True)
class MessageFit:
    """Segments by size.

    `predict` never falls with the size, also where a segment begins lower than one ended.
    """

    segments: tuple[Segment, ...]
    low_bytes: float  # smallest and largest size that was measured
    high_bytes: float

    def link(self, num_bytes: float) -> Link:
        """The link of the segment in which a message of this size lies."""
        return next(segment.link for segment in self.segments if num_bytes < segment.high_bytes)

    def predict(
        self, num_bytes: float, *, mbit: float | None = None, payload_share: float = 1.0
    ) -> float:
        """Seconds that one message takes; `mbit`: on a link shaped to this rate."""
        seconds = self.link(num_bytes).shaped(mbit, payload_share).seconds(num_bytes)

        for segment in self.segments:
            if segment.high_bytes <= num_bytes:
                seconds = max(
                    seconds, segment.link.shaped(mbit, payload_share).seconds(segment.high_bytes)
                )

        return seconds

    def to_json(self) -> dict[str, Any]:
        """The same as plain numbers; the last segment has no end (null)."""
        segments = [
            {
                "high_bytes": None if math.isinf(segment.high_bytes) else segment.high_bytes,
                "alpha_s": segment.link.alpha_s,
                "beta_s_per_byte": segment.link.beta_s_per_byte,
            }
            for segment in self.segments
        ]
        return {"segments": segments, "low_bytes": self.low_bytes, "high_bytes": self.high_bytes}


def fit_messages(points: Points) -> MessageFit:
    """The fit with the number of segments that the data ask for. ValueError below 3 sizes."""
    x, y = _columns(points)
    sizes = np.unique(x)

    if len(sizes) < SIZES_PER_SEGMENT:
        raise ValueError(
            f"{len(sizes)} sizes: a line with its error needs at least {SIZES_PER_SEGMENT}"
        )

    pieces = _Pieces(x, y, sizes)
    most = min(MOST_SEGMENTS, len(sizes) // SIZES_PER_SEGMENT)
    cuts = min(
        (pieces.best(count) for count in range(1, most + 1)), key=lambda cuts: pieces.badness(cuts)
    )
    links = [pieces.link(begin, end) for begin, end in itertools.pairwise(cuts)]
    ends = [
        _border(sizes[cut - 1], sizes[cut], links[at], links[at + 1])
        for at, cut in enumerate(cuts[1:-1])
    ]
    segments = [Segment(end, link) for end, link in zip([*ends, math.inf], links, strict=True)]
    return MessageFit(tuple(segments), float(sizes[0]), float(sizes[-1]))


def line(points: Points) -> Link:
    """One alpha and one beta for all points, both at least 0: the robust line in log error."""
    x, y = _columns(points)
    alpha, beta = _robust_line(x, y)
    return Link(alpha, beta)


@dataclass(frozen=True)
class LeftOut:
    """One size, and what a fit that has not seen it says: seconds."""

    fitted_s: float
    measured_s: float  # median

    @property
    def error(self) -> float:
        """The relative error, signed."""
        return self.fitted_s / self.measured_s - 1


def left_out_sizes(points: Points) -> dict[float, LeftOut]:
    """Size -> the fit without it beside the median measured. {} below 4 sizes."""
    sizes = sorted({size for size, _ in points})
    if len(sizes) <= SIZES_PER_SEGMENT:
        return {}
    found = {}

    for size in sizes:
        fitted = fit_messages([point for point in points if point[0] != size])
        found[size] = LeftOut(fitted.predict(size), median_at(points, size))

    return found


def error_near(
    left_out: Mapping[float, LeftOut], num_bytes: float, at_rate: Callable[[float], float]
) -> float | None:
    """The worst relative error over left-out sizes within a factor of 4 of this one.

    None where there is none.
    """
    near = [
        abs(each.fitted_s - each.measured_s) / max(each.measured_s, at_rate(size))
        for size, each in left_out.items()
        if 1 / NEAR <= size / num_bytes <= NEAR
    ]
    return max(near, default=None)


def error_beyond(points: Points, num_bytes: float) -> float | None:
    """Relative error of reaching as far past the measured sizes as this one lies.

    It is tried where it can be checked: for a size twice the largest, the fit without all sizes
    above half of the largest is held against those. 0 inside the measured range; None where too few
    sizes are left to try it.
    """
    sizes = sorted({size for size, _ in points})
    low = sizes[0]
    high = sizes[-1]
    factor = max(num_bytes / high, low / num_bytes)
    if factor <= 1:
        return 0.0
    inside = [
        size
        for size in sizes
        if (size <= high / factor if num_bytes > high else size >= low * factor)
    ]
    if len(inside) < SIZES_PER_SEGMENT:
        return None
    fitted = fit_messages([point for point in points if point[0] in inside])
    outside = [size for size in sizes if size not in inside]
    return max(abs(fitted.predict(size) / median_at(points, size) - 1) for size in outside)


def left_out_rates(fitted: MessageFit, shaped: Mapping[float, Points]) -> dict[float, float]:
    """Rate in Mbit/s -> its worst relative error, with the share taken from the other rates.

    Empty below 2 rates.
    """
    errors = {}

    for mbit, points in shaped.items():
        share = payload_share(
            fitted, {other: points for other, points in shaped.items() if other != mbit}
        )
        if share is None:
            continue
        each = [
            fitted.predict(size, mbit=mbit, payload_share=share) / median_at(points, size) - 1
            for size in sorted({size for size, _ in points})
        ]
        errors[mbit] = max(each, key=abs)

    return errors


def payload_share(fitted: MessageFit, shaped: Mapping[float, Points]) -> float | None:
    """What headers leave of a link's rate: median over the points at which the link, not the host,
    was the limit."""
    shares = []

    for mbit, points in shaped.items():
        for size, seconds in points:
            link = fitted.link(size)
            ideal_s = 8 * size / (mbit * BITS_PER_MBIT)
            left_s = seconds - link.alpha_s
            if left_s > 0 and ideal_s > link.beta_s_per_byte * size:
                shares.append(ideal_s / left_s)

    return min(1.0, float(np.median(shares))) if shares else None


# -- inside ----------------------------------------------------------------------------------------


class _Pieces:
    """Lines over runs of neighbouring sizes, each fitted once.

    `cuts` are indices into the sizes, the first 0 and the last n.
    """

    def __init__(self, x: _Floats, y: _Floats, sizes: _Floats) -> None:
        self._x = x
        self._y = y
        self._sizes = sizes
        self._known: dict[tuple[int, int], tuple[Link, float]] = {}

    def link(self, begin: int, end: int) -> Link:
        return self._fitted(begin, end)[0]

    def best(self, count: int) -> list[int]:
        """The cuts of `count` segments with the least error."""
        return self._cut(0, count)

    def badness(self, cuts: Sequence[int]) -> float:
        """2 n ln(mean error) + 6 ln n per segment: Laplace errors and twice BIC's price for alpha,
        beta and the border.

        Borders are searched for, which BIC does not know: at its price one line in four gets a
        second segment for nothing (3 of 12 at 3 % and at 10 % noise), at this one none.
        """
        n = len(self._x)
        mean = max(self._error(cuts) / n, FINE_ENOUGH)
        return 2 * n * math.log(mean) + 6 * (len(cuts) - 1) * math.log(n)

    def _cut(self, begin: int, count: int) -> list[int]:
        last = len(self._sizes)
        if count == 1:
            return [begin, last]
        ends = range(begin + SIZES_PER_SEGMENT, last - SIZES_PER_SEGMENT * (count - 1) + 1)
        return min(([begin, *self._cut(end, count - 1)] for end in ends), key=self._error)

    def _error(self, cuts: Sequence[int]) -> float:
        return sum(self._fitted(begin, end)[1] for begin, end in itertools.pairwise(cuts))

    def _fitted(self, begin: int, end: int) -> tuple[Link, float]:
        if (begin, end) not in self._known:
            inside = (self._x >= self._sizes[begin]) & (self._x <= self._sizes[end - 1])
            x = self._x[inside]
            y = self._y[inside]
            alpha, beta = _robust_line(x, y)
            error = float(np.abs(np.log((alpha + beta * x) / y)).sum())
            self._known[begin, end] = (Link(alpha, beta), error)
        return self._known[begin, end]


def _columns(points: Points) -> tuple[_Floats, _Floats]:
    x, y = (np.array([point[axis] for point in points], dtype=float) for axis in (0, 1))
    if not len(x) or not (np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise ValueError("a fit needs points (bytes, seconds), all above 0 and finite")
    return x, y


def _robust_line(x: _Floats, y: _Floats, rounds: int = 60) -> tuple[float, float]:
    """(alpha, beta) >= 0 that minimise sum |log((alpha + beta x) / y)|.

    Damped Gauss-Newton over the logs of both (so neither becomes negative), reweighted by 1 /
    |error|; held against both ends, which the logs do not reach: bytes alone, and a message alone.
    """
    smallest = y[x == x.min()]
    logs = np.log([float(np.median(smallest)) / 2, float(np.median(y / x)) / 2])
    ends = (
        (0.0, float(np.exp(np.median(np.log(y / x))))),
        (float(np.exp(np.median(np.log(y)))), 0.0),
    )
    least, best = min((float(np.abs(np.log((a + b * x) / y)).sum()), (a, b)) for a, b in ends)
    idle = 0

    for _ in range(rounds):
        alpha, beta = np.exp(logs)
        fitted = alpha + beta * x
        residual = np.log(fitted / y)
        error = float(np.abs(residual).sum())
        idle = 0 if error < least * (1 - 1e-6) - 1e-9 else idle + 1

        if error < least:
            best = (float(alpha), float(beta))
            least = error

        if idle == 6:
            break
        weight = 1 / np.maximum(np.abs(residual), 1e-4)
        slopes = np.stack(
            [alpha / fitted, beta * x / fitted]
        )  # (2, n): of log(fitted) in the two logs
        normal = (slopes * weight) @ slopes.T
        step = np.linalg.solve(
            normal + 1e-3 * np.trace(normal) * np.eye(2), -(slopes * weight) @ residual
        )
        logs = logs + np.clip(step, -2.0, 2.0)

    return best


def _border(last: float, first: float, before: Link, after: Link) -> float:
    """The size at which a segment ends.

    Where both lines meet, if that is between its last size and the next one's first.
    """
    slope = after.beta_s_per_byte - before.beta_s_per_byte
    meeting = (before.alpha_s - after.alpha_s) / slope if slope else math.inf
    return float(meeting) if last < meeting <= first else math.sqrt(last * first)


def median_at(points: Points, size: float) -> float:
    """The median of the seconds that a size took."""
    return float(np.median([seconds for at, seconds in points if at == size]))
