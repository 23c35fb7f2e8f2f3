"""Which part of a run is measured: the warm-up is dropped (MSER-5), the rest is one window of time.

Throughput = samples / time over the window, never the mean of per-step rates (Jensen). Asynchronous
workers do not step together: their window is fixed in time, or a stall would hide itself. Imports
numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_WARMUP_STEPS = 5
MAX_WARMUP_SHARE = 0.3
BATCH = 5  # MSER-5: means of 5
MIN_BATCHES = 10  # batch means for a within-run interval

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Window:
    """Samples and seconds between two moments; `low` and `high` of samples/s where the run is
    long enough.
    """

    warmup_steps: int
    start_s: float
    stop_s: float
    samples: int
    samples_per_s: float | None
    low: float | None
    high: float | None
    step_s: Floats  # durations of the steps inside


def warmup(step_s: Sequence[float] | Floats) -> int:
    """Steps to drop: at least 5, then until MSER-5 says steady, at most 30 % (fewer than 5 where 30
    % are fewer).

    MSER-5 (White 1997): of the means of 5 consecutive steps drop the first d that minimise the
    rest's standard error.
    """
    steps = np.asarray(step_s, dtype=np.float64)
    most = int(len(steps) * MAX_WARMUP_SHARE)
    if most < MIN_WARMUP_STEPS:
        return most

    means = steps[: len(steps) // BATCH * BATCH].reshape(-1, BATCH).mean(axis=1)
    candidates = range(min(most // BATCH, len(means) - 2) + 1)
    errors = [float(means[d:].var() / (len(means) - d)) for d in candidates]
    return min(most, max(MIN_WARMUP_STEPS, int(np.argmin(errors)) * BATCH))


def together(start_s: Floats, end_s: Floats, samples: Floats) -> Window:
    """Workers that step in lock-step.

    Arrays are (workers, steps); a step ends when its last worker ends.
    """
    durations = (end_s - start_s).max(axis=0)
    dropped = warmup(durations)
    ends = end_s.max(axis=0)
    begin = float(ends[dropped - 1]) if dropped else float(start_s.min())
    gaps = np.diff(np.concatenate([[begin], ends[dropped:]]))

    return _window(
        dropped, begin, float(ends[-1]), samples[:, dropped:].sum(axis=0), gaps, durations[dropped:]
    )


def apart(start_s: Sequence[Floats], end_s: Sequence[Floats], samples: Sequence[Floats]) -> Window:
    """Workers that do not wait for each other: one array per worker.

    An update is 1/N of a step: the warm-up is found on N updates together, and one update per
    worker more is dropped. The window closes when the first worker is done.
    """
    ends = np.concatenate(list(end_s))
    durations = np.concatenate([e - s for s, e in zip(start_s, end_s, strict=True)])
    sizes = np.concatenate(list(samples))
    order = np.argsort(ends, kind="stable")
    ends = ends[order]
    durations = durations[order]
    sizes = sizes[order]
    count = len(end_s)
    rounds = durations[: len(durations) // count * count].reshape(-1, count).mean(axis=1)
    dropped = min((warmup(rounds) + 1) * count, len(ends) - 1)
    begin = float(ends[dropped - 1]) if dropped else float(min(s[0] for s in start_s))
    stop = float(min(worker[-1] for worker in end_s if len(worker)))
    inside = (ends > begin) & (ends <= stop)
    gaps = np.diff(np.concatenate([[begin], ends[inside]]))

    return _window(dropped, begin, stop, sizes[inside], gaps, durations[inside])


def _window(
    dropped: int, begin: float, stop: float, samples: Floats, gaps: Floats, step_s: Floats
) -> Window:
    total = int(samples.sum())
    seconds = stop - begin
    rate = total / seconds if seconds > 0 and total else None
    low, high = interval(gaps, float(samples.mean())) if len(samples) else (None, None)

    return Window(dropped, begin, stop, total, rate, low, high, step_s)


def interval(gaps: Floats, samples_per_gap: float) -> tuple[float | None, float | None]:
    """95 % interval of samples/s by batch means; (None, None) below 10 batches of 10
    autocorrelation times.
    """
    length = max(1, math.ceil(10 * autocorrelation_time(gaps)))
    count = len(gaps) // length
    if count < MIN_BATCHES:
        return None, None

    means = gaps[: count * length].reshape(count, length).mean(axis=1)
    half = _t975(count - 1) * float(means.std(ddof=1)) / math.sqrt(count)
    mean = float(means.mean())
    if mean - half <= 0:
        return None, None

    return samples_per_gap / (mean + half), samples_per_gap / (mean - half)


def autocorrelation_time(series: Floats) -> float:
    """Integrated autocorrelation time 1 + 2 sum rho_k, summed until the first k > 5 tau (Sokal
    1997); at least 1.
    """
    centred = series - series.mean()
    variance = float(centred @ centred)
    if len(series) < 4 or variance == 0:
        return 1.0

    tau = 1.0
    for lag in range(1, len(series) // 2):
        tau += 2 * float(centred[:-lag] @ centred[lag:]) / variance
        if lag > 5 * tau:
            break

    return max(1.0, tau)


def _t975(degrees: int) -> float:
    """97.5 % quantile of Student's t (Cornish-Fisher expansion; error below 0.002 from 9 degrees
    of freedom).
    """
    z = 1.959963984540054
    n = degrees
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384

    return z + first / n + second / n**2 + third / n**3
