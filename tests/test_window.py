"""The measured window, by hand: warm-up, throughput with a stall, workers apart, the within-run
interval."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchsuite.measure import window


def lock_step(durations: list[float], workers: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """(workers, steps) starts and ends; worker 0 takes each step's time, the others half of it and
    then wait."""
    edges = np.concatenate([[0.0], np.cumsum(durations)])
    starts = np.tile(edges[:-1], (workers, 1))
    ends = np.tile(edges[1:], (workers, 1))
    ends[1:] -= np.array(durations) / 2
    return starts, ends


def one_after_another(durations: list[float]) -> tuple[np.ndarray, np.ndarray]:
    edges = np.concatenate([[0.0], np.cumsum(durations)])
    return edges[:-1], edges[1:]


@pytest.mark.parametrize(
    ("step_s", "dropped"),
    [
        ([], 0),
        ([1.0] * 10, 3),  # 30 % of few
        ([1.0] * 16, 4),
        ([1.0] * 17, 5),  # at least 5
        ([2.0] * 10 + [1.0] * 90, 10),  # two means of 5 are slow: the rest has no variance
        ([9.0] + [1.0] * 99, 5),
        (
            [2.0] * 50 + [1.0] * 50,
            5,
        ),  # slow for half the run is no warm-up: 0.25 / 20 is less than what follows
    ],
)
def test_warm_up_is_5_steps_then_until_steady_at_most_30_percent(
    step_s: list[float], dropped: int
) -> None:
    assert window.warmup(step_s) == dropped


def test_warm_up_never_takes_more_than_30_percent() -> None:
    rng = np.random.default_rng(0)
    falling = np.linspace(3, 1, 60) + rng.normal(0, 0.01, 60)
    assert window.warmup(falling) == 15  # three means of 5; 30 % of 60 are 18


def test_together_a_stall_does_not_hide() -> None:
    """20 steps of 1 s, one of them stalls for 11 s. Warm-up 5: 15 steps x 2 workers x 4 samples in
    25 s."""
    starts, ends = lock_step([1.0] * 12 + [11.0] + [1.0] * 7)
    found = window.together(starts, ends, np.full((2, 20), 4.0))
    assert (found.warmup_steps, found.start_s, found.stop_s, found.samples) == (5, 5.0, 30.0, 120)
    assert found.samples_per_s == pytest.approx(120 / 25)
    mean_of_rates = 8 * (14 + 1 / 11) / 15
    assert mean_of_rates == pytest.approx(7.515, abs=1e-3), (
        "what a mean of per-step rates would have said"
    )
    assert np.median(found.step_s) == 1.0 and max(found.step_s) == 11.0


def test_together_a_step_lasts_as_long_as_its_slowest_worker() -> None:
    starts, ends = lock_step([2.0] * 20)
    assert list(window.together(starts, ends, np.ones((2, 20))).step_s) == [2.0] * 15


def test_apart_a_stall_does_not_hide() -> None:
    """Worker 0: 40 steps of 1 s. Worker 1: 10 of 1 s, one of 20 s, 10 of 1 s. 2 samples each.

    An update is half a step: warm-up 5 x 2 updates + one per worker = 12; the 12th ends at 6 s.
    Until 40 s: 34 + 15.
    """
    steady = one_after_another([1.0] * 40)
    stalled = one_after_another([1.0] * 10 + [20.0] + [1.0] * 10)
    sizes = [np.full(40, 2.0), np.full(21, 2.0)]
    found = window.apart([steady[0], stalled[0]], [steady[1], stalled[1]], sizes)
    assert (found.warmup_steps, found.start_s, found.stop_s, found.samples) == (12, 6.0, 40.0, 98)
    assert found.samples_per_s == pytest.approx(98 / 34)
    assert found.samples_per_s < 3, (
        "4 a second without the stall, which a window of so many updates would nearly show"
    )


def test_apart_the_window_ends_when_the_first_worker_is_done() -> None:
    """What one worker does alone afterwards is not what N workers do: 10 + 5 steps, not 10 + 20."""
    long = one_after_another([1.0] * 30)
    short = one_after_another([1.0] * 10)
    found = window.apart([long[0], short[0]], [long[1], short[1]], [np.ones(30), np.ones(10)])
    assert found.stop_s == 10.0
    assert found.samples == sum(end > found.start_s for end in [*long[1][:10], *short[1]])


@pytest.mark.parametrize("steps", [20, 40, 400])
def test_throughput_does_not_grow_with_the_number_of_steps(steps: int) -> None:
    starts, ends = lock_step([0.5] * steps)
    assert window.together(starts, ends, np.full((2, steps), 8.0)).samples_per_s == pytest.approx(
        2 * 8 / 0.5
    )


def test_the_interval_is_students_t_of_batch_means() -> None:
    """Ten batches of ten gaps, means 0.9 and 1.1 in turn: mean 1, s = sqrt(0.1/9), half = 2.262 s /
    sqrt(10)."""
    means = np.repeat([0.9, 1.1] * 5, 10)
    gaps = means + 0.5 * np.where(np.arange(100) % 2, 1, -1)
    half = 2.2622 * math.sqrt(0.1 / 9) / math.sqrt(10)
    low, high = window.interval(gaps, 8.0)
    assert low == pytest.approx(8 / (1 + half), rel=1e-3) and high == pytest.approx(
        8 / (1 - half), rel=1e-3
    )


def test_a_short_run_has_no_interval() -> None:
    assert window.interval(np.ones(99), 8.0) == (None, None)  # 9 batches of 10
    assert window.interval(np.ones(100), 8.0) == (8.0, 8.0)


def test_correlated_steps_count_for_less() -> None:
    noise = np.random.default_rng(0).normal(1, 0.1, 4000)
    assert window.autocorrelation_time(noise) == pytest.approx(1, abs=0.3)
    assert window.autocorrelation_time(np.repeat(noise[:400], 10)) == pytest.approx(10, rel=0.25)
    assert window.interval(noise, 1.0)[0] is not None
    assert window.interval(np.repeat(noise[:80], 10), 1.0) == (None, None), (
        "80 independent gaps, not 800"
    )


@pytest.mark.parametrize(("degrees", "quantile"), [(9, 2.2622), (19, 2.0930), (99, 1.9842)])
def test_quantiles_of_students_t(degrees: int, quantile: float) -> None:
    assert window._t975(degrees) == pytest.approx(quantile, abs=2e-3)
