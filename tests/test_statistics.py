"""No number without n and a spread: each rule against a computation by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchsuite.analysis.statistics import (
    bootstrap_median,
    compare,
    lower_share,
    quartiles,
    ratio,
    summarize,
)

INF = math.inf


def test_fewer_than_five_launches_give_their_points_and_the_range():
    summary = summarize([3.0, 1.0, 2.0])
    assert (summary.n, summary.center, summary.low, summary.high, summary.kind) == (
        3,
        2.0,
        1.0,
        3.0,
        "range",
    )
    assert summary.points == (3.0, 1.0, 2.0)


def test_five_to_nine_launches_give_a_t_interval_of_the_logs():
    values = [
        1.0,
        2.0,
        4.0,
        8.0,
        16.0,
    ]  # logs are k ln 2: mean 2 ln 2, standard deviation sqrt(2.5) ln 2
    half = 2.7764451 * math.sqrt(2.5) * math.log(2) / math.sqrt(5)
    summary = summarize(values)
    assert summary.kind == "t interval" and summary.center == pytest.approx(4.0)
    assert summary.low == pytest.approx(4 * math.exp(-half), rel=1e-6)
    assert summary.high == pytest.approx(4 * math.exp(half), rel=1e-6)


def test_ten_launches_give_a_bootstrap_interval_that_repeats_and_holds_the_median():
    values = [float(v) for v in range(1, 22)]
    summary = summarize(values)
    assert summary.kind == "bootstrap" and summary.center == 11
    assert 5 <= summary.low < 11 < summary.high <= 17
    assert (summary.low, summary.high) == bootstrap_median(values)


def test_bootstrap_covers_the_true_median_about_as_often_as_it_says():
    rng = np.random.default_rng(7)
    covered = sum(
        low <= 1.0 <= high
        for low, high in (bootstrap_median(np.exp(rng.normal(size=15))) for _ in range(200))
    )
    assert 0.88 <= covered / 200 <= 0.995, f"{covered} of 200"


def test_a_deterministic_quantity_has_no_spread():
    assert summarize([7.0, 7.0]).kind == "exact"
    assert summarize([7.0]).kind == "range"  # one launch proves nothing


def test_a_miss_is_infinite_and_stays_in_the_median():
    assert summarize([1.0, INF, 2.0]).center == 2.0
    assert summarize([1.0, INF, INF]).center == INF
    assert summarize([1.0, 2.0, 3.0, INF]).center == 2.5
    assert summarize([1.0, 2.0, INF, INF]).center == INF  # half of the runs never arrived
    summary = summarize([5.0, INF, 3.0])
    assert (summary.center, summary.low, summary.high, summary.misses) == (5.0, 3.0, INF, 1)
    assert summarize([1.0, 2.0, 3.0, 4.0, INF]).kind == "range"  # no interval over a censored value
    many = summarize([1.0] * 9 + [INF] * 3)
    assert many.center == 1.0 and many.misses == 3 and not math.isnan(many.high)


def test_nothing_and_nan_are_different():
    assert summarize([]).n == 0
    with pytest.raises(ValueError, match="never NaN"):
        summarize([1.0, math.nan])


def test_ratio_of_medians_with_the_range_of_all_ratios():
    summary = ratio([2.0, 4.0, 6.0], [1.0, 2.0, 4.0])
    assert (summary.center, summary.low, summary.high, summary.kind) == (2.0, 0.5, 6.0, "range")
    paired = ratio([2.0, 4.0, 6.0], [1.0, 2.0, 4.0], paired=True)
    assert (paired.low, paired.high, paired.points) == (1.5, 2.0, (2.0, 2.0, 1.5))


def test_ratio_of_five_or_more_equals_the_t_tests_of_the_logs():
    rng = np.random.default_rng(1)
    a = np.exp(rng.normal(0.2, 0.1, 6))
    b = np.exp(rng.normal(0.0, 0.1, 6))
    interval = stats.ttest_rel(np.log(a), np.log(b)).confidence_interval(0.95)
    paired = ratio(a, b, paired=True)
    assert (paired.low, paired.high) == pytest.approx(
        (math.exp(interval.low), math.exp(interval.high))
    )
    interval = stats.ttest_ind(np.log(a), np.log(b), equal_var=False).confidence_interval(0.95)
    unpaired = ratio(a, b)
    assert (unpaired.low, unpaired.high) == pytest.approx(
        (math.exp(interval.low), math.exp(interval.high))
    )


def test_ratio_of_ten_or_more_is_bootstrapped_and_pairs_stay_together():
    a = [1.1 * v for v in range(1, 13)]
    b = [float(v) for v in range(1, 13)]
    paired = ratio(a, b, paired=True)
    assert (
        paired.kind == "bootstrap"
        and paired.low == pytest.approx(1.1)
        and paired.high == pytest.approx(1.1)
    )
    assert ratio(a, b).high > 1.2


def test_ratio_refuses_what_has_none():
    with pytest.raises(ValueError, match="positive, finite"):
        ratio([1.0, INF], [1.0, 1.0])
    with pytest.raises(ValueError, match="one value per block"):
        ratio([1.0], [1.0, 2.0], paired=True)


def test_three_against_three_are_too_few_and_four_against_four_are_not():
    result = compare([1.0, 2.0, 3.0], [10.0, 11.0, 12.0])
    assert (
        result.verdict == "too few" and result.p is None and result.smallest_p == pytest.approx(0.1)
    )
    result = compare([1.0, 2.0, 3.0, 4.0], [10.0, 11.0, 12.0, 13.0])
    assert result.verdict == "different" and result.p == pytest.approx(2 / 70)
    assert compare([1.0, 3.0, 5.0, 7.0], [2.0, 4.0, 6.0, 8.0]).verdict == "not told apart"


def test_a_share_has_the_lower_bound_that_so_many_trials_allow() -> None:
    assert lower_share(60, 60) == pytest.approx(0.05 ** (1 / 60), abs=1e-12)
    assert lower_share(57, 60) == pytest.approx(0.876, abs=1e-3)
    assert lower_share(0, 60) == 0.0
    for k, n in (
        (57, 60),
        (1, 3),
        (30, 60),
    ):  # at the bound, k or more of n are seen in one case out of twenty
        p = lower_share(k, n)
        seen = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
        assert seen == pytest.approx(0.05, abs=1e-9), f"{k} of {n}: {seen}"


def test_quartiles_are_observed_values_and_misses_count() -> None:
    assert quartiles([4.0, 1.0, 3.0, 2.0]) == (1.0, 3.0)
    assert quartiles([5.0]) == (5.0, 5.0)
    assert quartiles([1.0, 2.0, math.inf, math.inf]) == (1.0, math.inf)
    assert all(math.isnan(value) for value in quartiles([]))
