"""Tango's interval against its definition by brute force, and against simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from mlx_svd.evaluate.statistics.matched_shares import (
    share_difference_interval,
    share_difference_p,
    share_difference_score,
)

TABLES = st.integers(1, 60).flatmap(
    lambda n: st.integers(0, n).flatmap(
        lambda a: st.tuples(st.just(a), st.integers(0, n - a), st.just(n))
    )
)


def score_by_brute_force(lost, gained, n, difference):
    """The share of losses by numeric maximization of the likelihood under the difference."""

    def negative_log_likelihood(q):
        shares = np.array([q, q + difference, 1 - 2 * q - difference])
        counts = np.array([lost, gained, n - lost - gained])
        kept = counts > 0
        return -(counts[kept] * np.log(np.maximum(shares[kept], 1e-300))).sum()

    low, high = max(0.0, -difference), (1 - difference) / 2
    q = minimize_scalar(
        negative_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
    ).x
    variance = n * (2 * q + difference - difference**2)
    return (gained - lost - n * difference) / np.sqrt(variance)


@pytest.mark.parametrize("table", [(3, 9, 40), (12, 1, 60), (1, 1, 200), (20, 30, 50)])
@pytest.mark.parametrize("difference", [-0.3, -0.05, 0.02, 0.2])
def test_statistic_is_that_of_the_constrained_maximum_likelihood(table, difference):
    expected = score_by_brute_force(*table, difference)
    assert share_difference_score(*table, difference) == pytest.approx(expected, abs=1e-4)


def test_statistic_of_no_difference_is_that_of_mcnemar():
    assert share_difference_score(4, 12, 90, 0.0) == pytest.approx(8 / np.sqrt(16))


@settings(deadline=None, max_examples=200)
@given(TABLES)
def test_interval_holds_the_estimate_and_mirrors_when_the_runs_are_swapped(table):
    lost, gained, n = table
    low, high = share_difference_interval(lost, gained, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert low < high
    mirrored = share_difference_interval(gained, lost, n)
    assert mirrored == pytest.approx((-high, -low), abs=1e-9)


@settings(deadline=None, max_examples=100)
@given(TABLES)
def test_ends_of_the_interval_are_where_the_test_starts_to_reject(table):
    low, high = share_difference_interval(*table)
    if low > -1:
        assert share_difference_score(*table, low) == pytest.approx(norm.ppf(0.975), abs=1e-5)
    if high < 1:
        assert share_difference_score(*table, high) == pytest.approx(norm.ppf(0.025), abs=1e-5)


def test_interval_without_flips_still_has_a_width():
    z2 = norm.ppf(0.975) ** 2
    low, high = share_difference_interval(0, 0, 100)
    assert (low, high) == pytest.approx((-z2 / (100 + z2), z2 / (100 + z2)))


@pytest.mark.parametrize("shares", [(0.05, 0.05), (0.02, 0.01), (0.01, 0.06), (0.3, 0.2)])
@pytest.mark.parametrize("n", [50, 200])
def test_interval_holds_the_true_difference_about_as_often_as_it_says(shares, n):
    lost, gained = shares
    rng = np.random.default_rng(0)
    tables = rng.multinomial(n, [lost, gained, 1 - lost - gained], size=2000)
    held = sum(
        low <= gained - lost <= high
        for low, high in (share_difference_interval(a, b, n) for a, b, _ in tables)
    )
    assert held / 2000 > 0.93


def test_one_sided_p_is_small_only_if_the_gain_exceeds_the_difference():
    assert share_difference_p(2, 30, 100, 0.1) < 0.01
    assert share_difference_p(2, 30, 100, 0.28) == pytest.approx(0.5, abs=1e-9)
    assert share_difference_p(30, 2, 100, 0.0) > 0.99
