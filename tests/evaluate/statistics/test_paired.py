"""Paired tests against scipy, statsmodels, brute force over all sign flips, and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.statistics.matched_shares import share_difference_interval
from mlx_svd.evaluate.statistics.paired import (
    bootstrap_interval,
    equivalence,
    flips,
    holm,
    mcnemar,
    paired_difference,
    sign_flip_test,
)

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def ones(values):
    return np.ones(len(values), dtype=int)


@pytest.mark.parametrize("table", [(0, 1), (3, 9), (11, 7), (40, 60), (5, 0)])
def test_mcnemar_is_the_exact_test_of_statsmodels(table):
    lost, gained = table
    expected = reference_mcnemar([[50, lost], [gained, 30]], exact=True).pvalue
    assert mcnemar(lost, gained) == pytest.approx(expected)


def test_mcnemar_of_the_seed_documents_best_case_is_not_significant():
    assert mcnemar(0, 4) == pytest.approx(0.125)
    assert mcnemar(0, 0) == 1.0


@settings(deadline=None, max_examples=30)
@given(P_VALUES)
def test_holm_is_that_of_statsmodels(p_values):
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())


def test_holm_of_nothing_is_nothing():
    assert holm([]) == []


def test_flips_are_counted_both_ways():
    found = flips([1, 1, 0, 0, 1], [1, 0, 1, 0, 0])
    assert (found.lost, found.gained, found.n) == (2, 1, 5)
    assert found.discordance == 0.6


def test_sign_flip_test_is_that_over_all_flips():
    sums = np.array([0.3, -0.1, 0.7, 0.2, -0.05, 0.4, 0.6])
    totals = [abs(np.dot(s, sums)) for s in itertools.product((1, -1), repeat=len(sums))]
    expected = np.mean(np.array(totals) >= abs(sums.sum()) - 1e-12)
    assert sign_flip_test(sums) == pytest.approx(expected)


def test_sign_flip_test_of_flips_is_mcnemars():
    sums = np.array([1.0] * 9 + [-1.0] * 3 + [0.0] * 200)
    assert sign_flip_test(sums) == pytest.approx(mcnemar(3, 9), abs=0.02)


@pytest.mark.parametrize("clustered", [False, True])
def test_bootstrap_interval_holds_the_true_difference_about_as_often_as_it_says(
    clustered, monkeypatch
):
    monkeypatch.setattr("mlx_svd.evaluate.statistics.paired.RESAMPLES", 999)
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        counts = rng.integers(1, 6, 80) if clustered else np.ones(80, dtype=int)
        own = rng.exponential(1.0, 80) - 1.0  # skewed, shared by the rows of an item
        sums = counts * (0.1 + own) + np.sqrt(counts) * 0.5 * rng.standard_normal(80)
        low, high = bootstrap_interval(sums, counts, seed=int(rng.integers(1 << 30)))
        held += low <= 0.1 <= high
    assert 0.91 < held / 400 < 0.98


def test_bootstrap_draws_whole_items():
    rng = np.random.default_rng(3)
    values = rng.standard_normal(100)
    once = bootstrap_interval(values, ones(values))
    fivefold = bootstrap_interval(5 * values, 5 * ones(values))
    assert fivefold == pytest.approx(once)


def test_bootstrap_seeds_are_real():
    values = np.random.default_rng(4).standard_normal(50)
    first, again, other = (bootstrap_interval(values, ones(values), seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_bootstrap_of_few_flips_is_too_narrow_which_is_why_shares_use_the_score_interval():
    rng = np.random.default_rng(5)
    bootstrap = score = 0
    for _ in range(150):
        lost, gained, same = rng.multinomial(100, [0.02, 0.01, 0.97])
        sums = np.repeat([-1.0, 1.0, 0.0], [lost, gained, same])
        low, high = bootstrap_interval(sums, ones(sums))
        bootstrap += low <= -0.01 <= high
        low, high = share_difference_interval(lost, gained, 100)
        score += low <= -0.01 <= high
    assert bootstrap / 150 < 0.91
    assert score / 150 > 0.93


def test_difference_of_right_and_wrong_uses_mcnemar_and_the_score_interval():
    a, b = np.array([1] * 60 + [0] * 40), np.array([1] * 50 + [0] * 35 + [1] * 15)
    found = paired_difference(a, b, ones(a))
    assert found.value == pytest.approx(0.05)
    assert (found.method, found.test, found.n) == ("score", "McNemar", 100)
    assert found.p == pytest.approx(binomtest(10, 25).pvalue)
    assert (found.low, found.high) == share_difference_interval(10, 15, 100)
    assert found.bootstrap == pytest.approx((found.low, found.high), abs=0.015)


def test_several_rows_an_item_are_no_mcnemar_test():
    a, b, counts = np.array([2, 1, 0, 2]), np.array([1, 1, 1, 2]), np.array([2, 2, 2, 2])
    found = paired_difference(a, b, counts)
    assert (found.method, found.test, found.n) == ("bootstrap", "sign flip", 4)
    assert found.value == 0


def test_a_run_compared_with_itself_differs_by_nothing_and_flips_never():
    values = np.random.default_rng(6).random(40)
    found = paired_difference(values, values, ones(values))
    assert (found.value, found.error, found.low, found.high, found.p) == (0, 0, 0, 0, 1)


def test_equivalence_of_numbers_is_the_tost_of_statsmodels():
    rng = np.random.default_rng(7)
    a = rng.standard_normal(60)
    b = a + 0.02 + 0.3 * rng.standard_normal(60)
    p, low, high = ttost_paired(b, a, -0.1, 0.1)
    found = equivalence(a, b, ones(a), 0.1)
    assert found.p == pytest.approx(p)
    assert (found.p_low, found.p_high) == pytest.approx((low[1], high[1]))


@pytest.mark.parametrize("kind", ["shares", "numbers"])
def test_equivalence_and_its_interval_say_the_same(kind):
    rng = np.random.default_rng(8)
    for margin in (0.005, 0.02, 0.05, 0.2):
        a = rng.random(150) < 0.6
        b = np.where(rng.random(150) < 0.05, ~a, a)
        if kind == "numbers":
            a, b = a + 0.01 * rng.random(150), b + 0.01 * rng.random(150)
        found = equivalence(a, b, ones(a), margin)
        assert (found.p < 0.05) == (-margin < found.low and found.high < margin)
        assert (found.p_low < 0.05) == (-margin < found.low)


def test_no_flips_among_few_items_are_no_equivalence():
    few, many = np.ones(50), np.ones(1000)
    assert equivalence(few, few, ones(few), 0.01).p > 0.05
    assert equivalence(many, many, ones(many), 0.01).p < 0.05


def test_true_difference_at_the_margin_passes_in_at_most_one_case_of_twenty():
    rng = np.random.default_rng(9)
    passed = 0
    for _ in range(1000):
        lost, gained, same = rng.multinomial(400, [0.07, 0.02, 0.91])
        a = np.repeat([1, 0, 1], [lost, gained, same])
        b = np.repeat([0, 1, 1], [lost, gained, same])
        passed += equivalence(a, b, ones(a), 0.05).p < 0.05
    assert passed / 1000 < 0.07


def test_one_item_shows_nothing():
    found = paired_difference([0.3], [0.5], [1])
    assert (found.low, found.high, found.error) == (-math.inf, math.inf, math.inf)
    assert equivalence([0.3], [0.5], [1], 1.0).p == 1.0


@pytest.mark.parametrize("margin", [0.0, -0.1, math.nan, math.inf])
def test_a_margin_that_is_not_positive_is_refused(margin):
    with pytest.raises(MlxSvdError, match="margin"):
        equivalence([1, 0], [1, 0], [1, 1], margin)


def test_no_items_are_refused():
    with pytest.raises(MlxSvdError, match="at least one"):
        paired_difference([], [], [])
