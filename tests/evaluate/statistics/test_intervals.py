"""Intervals against scipy and against simulation."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, sem, t

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.statistics.intervals import (
    chance_mark,
    estimate,
    mean_interval,
    share_of,
    wilson,
    window_estimate,
)


@pytest.mark.parametrize(("count", "n"), [(0, 9), (1, 9), (5, 9), (9, 9), (870, 915)])
def test_wilson_is_the_interval_of_scipy(count, n):
    expected = binomtest(count, n).proportion_ci(0.95, method="wilson")
    assert wilson(count, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_share_counts_true_values_and_lies_in_its_interval():
    share = share_of(np.array([True, False, True, True]))
    assert (share.count, share.n, share.share) == (3, 4, 0.75)
    assert share.low < 0.75 < share.high
    assert share_of(np.ones(4, dtype=bool)).high == 1.0


def test_share_of_nothing_is_unknown():
    share = share_of(np.zeros(0, dtype=bool))
    assert math.isnan(share.share)
    assert (share.low, share.high) == (0.0, 1.0)


def test_interval_of_equal_windows_is_students_interval_of_their_means():
    means = np.array([3.0, 4.0, 4.5, 2.5, 3.2])
    expected = t.interval(0.95, 4, means.mean(), means.std(ddof=1) / math.sqrt(5))
    mean, low, high = mean_interval(means * 100, np.full(5, 100))
    assert mean == pytest.approx(means.mean())
    assert (low, high) == pytest.approx(expected)


def test_one_window_has_an_infinite_interval():
    assert mean_interval(np.array([6.0]), np.array([2])) == (3.0, -math.inf, math.inf)


def test_interval_of_unequal_windows_holds_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        counts = rng.integers(20, 60, 12)
        sums = counts * (2.0 + 0.3 * rng.standard_normal(12))
        _, low, high = mean_interval(sums, counts)
        held += low < 2.0 < high
    assert 0.92 < held / 2000 < 0.97


def test_error_and_interval_of_numbers_are_those_of_scipy():
    values = np.random.default_rng(0).random(30)
    found = estimate(values)
    expected = t.interval(0.95, 29, values.mean(), sem(values))
    assert (found.value, found.error) == pytest.approx((values.mean(), sem(values)))
    assert (found.low, found.high) == pytest.approx(expected)
    assert (found.n, found.rows) == (30, 30)


def test_right_and_wrong_have_wilsons_interval_and_the_usual_error():
    values = np.array([1, 1, 1, 0])
    found = estimate(values)
    assert (found.low, found.high) == wilson(3, 4)
    assert found.error == pytest.approx(sem(values))
    assert estimate(np.ones(50)).low < 1


def test_rows_of_one_item_count_as_one_item_not_as_more_evidence():
    values = np.random.default_rng(1).integers(0, 2, 40)
    items = np.arange(40)
    once, thrice = estimate(values), estimate(np.repeat(values, 3), np.repeat(items, 3))
    assert thrice.value == once.value
    assert thrice.error == pytest.approx(once.error)
    assert (thrice.n, thrice.rows) == (40, 120)
    assert estimate(np.repeat(values, 3)).error < 0.6 * once.error


def test_clustered_interval_holds_the_true_share_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    held = naive = 0
    items = np.repeat(np.arange(60), 4)
    for _ in range(1000):
        chances = rng.beta(1, 1, 60)
        values = rng.random(240) < np.repeat(chances, 4)
        clustered, wrong = estimate(values, items), estimate(values)
        held += clustered.contains(0.5)
        naive += wrong.contains(0.5)
    assert 0.93 < held / 1000 < 0.97
    assert naive / 1000 < 0.9


@pytest.mark.parametrize(
    ("right", "n", "chance", "mark"),
    [(26, 100, 0.25, "chance"), (60, 100, 0.25, ""), (10, 100, 0.25, "below chance")],
)
def test_a_score_whose_interval_contains_chance_is_marked(right, n, chance, mark):
    assert chance_mark(estimate(np.arange(n) < right), chance) == mark


@pytest.mark.parametrize(
    ("values", "items", "words"),
    [
        ([], None, "at least one value"),
        ([1.0, math.nan], None, "value 1 is nan"),
        ([1.0, 0.0], ["x"], "2 values belong to 1 items"),
    ],
)
def test_values_that_have_no_mean_are_refused(values, items, words):
    with pytest.raises(MlxSvdError, match=words):
        estimate(np.array(values), items)


def test_standard_error_of_a_perplexity_is_about_that_of_leaving_out_one_window_each():
    generator = np.random.default_rng(3)
    counts = generator.integers(300, 512, 60)
    sums = counts * generator.normal(3.0, 0.3, 60)
    found = window_estimate(sums, counts).exponential(1.2)
    assert found.value == pytest.approx(math.exp(1.2 * sums.sum() / counts.sum()))
    left = np.exp(1.2 * (sums.sum() - sums) / (counts.sum() - counts))
    jackknife = math.sqrt(59 / 60 * ((left - left.mean()) ** 2).sum())
    assert found.error == pytest.approx(jackknife, rel=0.03)
    low, high = (math.exp(1.2 * x) for x in mean_interval(sums, counts)[1:])
    assert (found.low, found.high) == pytest.approx((low, high))


def test_windows_that_are_all_right_have_no_share_of_single_trials():
    found = window_estimate(np.ones(8), np.ones(8), (0, 1))
    assert (found.low, found.high, found.error) == (1, 1, 0)
    assert estimate(np.ones(8)).low < 0.7, "eight right answers of eight questions are few"
