"""Intervals against scipy and against simulation."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, t

from mlx_svd.evaluate.statistics import mean_interval, share_of, wilson


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
