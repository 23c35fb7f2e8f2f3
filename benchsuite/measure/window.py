"""Which part of a run is measured: the warm-up is dropped (MSER-5), the rest is one window of time.

Throughput = samples / time over the window, never the mean of per-step rates, which is larger
(Jensen's inequality). Asynchronous workers do not step together: their window is fixed in time, or
a stall would hide itself. Imports numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_WARMUP_STEPS = 5
MAX_WARMUP_SHARE = 0.3
BATCH = 5  # the 5 of MSER-5: steps in a mean
MIN_BATCHES = 10  # batch means that an interval within a run needs
TIMES_IN_BATCH = 10  # autocorrelation times, so that batch means are independent

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Window:
    """Samples and seconds between two moments of a run.

    low, high: 95 % interval of samples per second, where the run is long enough for one.
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
    """Number of steps to drop at the beginning.

    At least 5, then until MSER-5 says that the rest is steady, at most 30 % of all (fewer than 5
    where 30 % are fewer). MSER-5 (White 1997): of the means of 5 consecutive steps drop the first d
    that minimise the standard error of the rest.
    """
    steps = np.asarray(step_s, dtype=np.float64)
    most = int(len(steps) * MAX_WARMUP_SHARE)
    if most < MIN_WARMUP_STEPS:
        return most

    means = steps[: len(steps) // BATCH * BATCH].reshape(-1, BATCH).mean(axis=1)  # (steps / 5,)
    candidates = range(min(most // BATCH, len(means) - 2) + 1)
    errors = [float(means[d:].var() / (len(means) - d)) for d in candidates]
    return min(most, max(MIN_WARMUP_STEPS, int(np.argmin(errors)) * BATCH))


def together(start_s: Floats, end_s: Floats, samples: Floats) -> Window:
    """The window of workers that step in lock-step.

    start_s, end_s, samples: (workers, steps). A step ends when its last worker ends.
    """
    durations = (end_s - start_s).max(axis=0)  # (steps,)
    dropped = warmup(durations)
    ends = end_s.max(axis=0)  # (steps,)
    begin = float(ends[dropped - 1]) if dropped else float(start_s.min())
    gaps = np.diff(np.concatenate([[begin], ends[dropped:]]))

    return _window(
        dropped, begin, float(ends[-1]), samples[:, dropped:].sum(axis=0), gaps, durations[dropped:]
    )


def apart(start_s: Sequence[Floats], end_s: Sequence[Floats], samples: Sequence[Floats]) -> Window:
    """The window of workers that do not wait for each other; each argument has one array per
    worker.

    An update is 1/N of a step: the warm-up is found on N updates together, and one update per
    worker more is dropped. The window closes when the first worker is done.
    """
    # All updates of all workers, in the order in which they ended: (updates,) each.
    ends = np.concatenate(list(end_s))
    durations = np.concatenate([e - s for s, e in zip(start_s, end_s, strict=True)])
    sizes = np.concatenate(list(samples))
    order = np.argsort(ends, kind="stable")
    ends = ends[order]
    durations = durations[order]
    sizes = sizes[order]
    count = len(end_s)
    # Means over as many updates as there are workers: what a step is to workers in lock-step.
    rounds = durations[: len(durations) // count * count].reshape(-1, count).mean(axis=1)
    dropped = min((warmup(rounds) + 1) * count, len(ends) - 1)
    begin = float(ends[dropped - 1]) if dropped else float(min(s[0] for s in start_s))
    stop = float(min(worker[-1] for worker in end_s if len(worker)))
    # The update that ends at `begin` was before the window, the one at `stop` is in it.
    inside = (ends > begin) & (ends <= stop)
    gaps = np.diff(np.concatenate([[begin], ends[inside]]))

    return _window(dropped, begin, stop, sizes[inside], gaps, durations[inside])


def _window(
    dropped: int, begin: float, stop: float, samples: Floats, gaps: Floats, step_s: Floats
) -> Window:
    """The figures of a window: its rate is samples over time, its interval comes from the gaps."""
    total = int(samples.sum())
    seconds = stop - begin
    rate = total / seconds if seconds > 0 and total else None
    low = None
    high = None
    if len(samples):
        low, high = interval(gaps, float(samples.mean()))

    return Window(dropped, begin, stop, total, rate, low, high, step_s)


def interval(gaps: Floats, samples_per_gap: float) -> tuple[float | None, float | None]:
    """The 95 % interval of samples per second, by means over batches of gaps.

    gaps: seconds between updates. A batch is 10 autocorrelation times long, so that the means are
    independent; (None, None) where there are fewer than 10 batches.
    """
    length = max(1, math.ceil(TIMES_IN_BATCH * autocorrelation_time(gaps)))
    count = len(gaps) // length
    if count < MIN_BATCHES:
        return None, None

    means = gaps[: count * length].reshape(count, length).mean(axis=1)
    # Of the seconds between updates: their inverse is the rate, with the ends exchanged.
    half = _t975(count - 1) * float(means.std(ddof=1)) / math.sqrt(count)
    mean = float(means.mean())
    if mean - half <= 0:
        return None, None

    return samples_per_gap / (mean + half), samples_per_gap / (mean - half)


def autocorrelation_time(series: Floats) -> float:
    """The integrated autocorrelation time 1 + 2 sum rho_k, in steps of the series; at least 1.

    The sum ends at the first k > 5 tau (Sokal 1997), since later terms are noise.
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
    """The 97.5 % quantile of Student's t, by the Cornish-Fisher expansion.

    Its error is below 0.002 from 9 degrees of freedom on.
    """
    z = 1.959963984540054  # the same quantile of the normal distribution
    n = degrees
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384

    return z + first / n + second / n**2 + third / n**3
