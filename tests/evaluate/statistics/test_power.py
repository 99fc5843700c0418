"""Detectable differences and needed items against simulation, statsmodels and known numbers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.statistics.paired import equivalence, mcnemar
from mlx_svd.evaluate.statistics.power import (
    detectable_mean_difference,
    detectable_share_difference,
    implied_interval,
    items_for_equivalence,
    items_for_interval,
    items_for_mean_difference,
    items_to_detect,
    limit_note,
)


def test_items_for_two_points_at_ten_percent_flips_is_the_published_rule_of_thumb():
    assert items_to_detect(0.02, 0.1) == pytest.approx(1960, abs=2)
    assert items_to_detect(0.05, 0.15) == pytest.approx(469, abs=1)


@pytest.mark.parametrize(("n", "discordance"), [(200, 0.1), (500, 0.2), (1000, 0.05)])
def test_mcnemar_shows_the_detectable_difference_about_four_times_in_five(n, discordance):
    difference = detectable_share_difference(n, discordance)
    lost, gained = (discordance - difference) / 2, (discordance + difference) / 2
    rng = np.random.default_rng(0)
    tables = rng.multinomial(n, [lost, gained, 1 - discordance], size=1500)
    shown = np.mean([mcnemar(a, b) < 0.05 for a, b, _ in tables])
    # The exact test is a little weaker than the normal approximation.
    assert 0.68 < shown < 0.86


@settings(deadline=None, max_examples=60)
@given(st.integers(20, 20000), st.floats(0.01, 1))
def test_detectable_difference_and_needed_items_undo_each_other(n, discordance):
    difference = detectable_share_difference(n, discordance)
    if difference < 1:
        assert items_to_detect(difference, discordance) in (n, n + 1)


def test_more_items_detect_less_and_more_flips_hide_more():
    few, many = (detectable_share_difference(n, 0.1) for n in (100, 1000))
    assert many < few
    assert detectable_share_difference(100, 0.3) > few


def test_without_flips_a_difference_is_detectable_that_would_make_some():
    found = detectable_share_difference(100, 0.0)
    assert 0.05 < found < 0.1


def test_three_items_detect_nothing():
    assert detectable_share_difference(3, 0.5) == 1.0


def test_items_for_a_mean_are_those_of_statsmodels():
    error, n = 0.02, 400  # standard deviation of the paired differences: 0.4
    expected = TTestPower().solve_power(0.03 / 0.4, power=0.8, alpha=0.05)
    assert items_for_mean_difference(0.03, error, n) == pytest.approx(expected, rel=0.01)
    assert detectable_mean_difference(error) == pytest.approx(2.8016 * error, rel=1e-4)
    assert items_for_mean_difference(0.03, math.inf, 1) == math.inf


def test_equal_runs_pass_the_equivalence_test_about_four_times_in_five_with_the_needed_items():
    n = items_for_equivalence(0.05, 0.4 / math.sqrt(100), 100)
    rng = np.random.default_rng(1)
    passed = 0
    for _ in range(600):
        b = 0.4 * rng.standard_normal(n)
        passed += equivalence(np.zeros(n), b, np.ones(n), 0.05).p < 0.05
    assert 0.74 < passed / 600 < 0.86
    assert items_for_equivalence(0.05, math.inf, 1) == math.inf


@pytest.mark.parametrize("n", [1, 10, 200, 1319])
def test_a_limit_implies_the_interval_of_statsmodels(n):
    low, high = proportion_confint(n // 2, n, method="wilson")
    assert implied_interval(n) == pytest.approx((high - low) / 2)


def test_items_for_an_interval_are_enough_and_one_fewer_is_not():
    for half_width in (0.2, 0.05, 0.031):
        n = items_for_interval(half_width)
        assert implied_interval(n) <= half_width
        assert implied_interval(n - 1) > half_width


def test_a_limit_below_what_a_claim_needs_is_said():
    note = limit_note(200, 0.01)
    assert "n = 200: a score" in note
    assert "+-6.9 points" in note
    assert "7,8" in note
    assert limit_note(8000, 0.01) == ""


@pytest.mark.parametrize(
    "call",
    [
        lambda: items_to_detect(0.0, 0.1),
        lambda: items_to_detect(0.1, 1.5),
        lambda: items_for_interval(0.0),
        lambda: implied_interval(0),
    ],
)
def test_questions_without_an_answer_are_refused(call):
    with pytest.raises(MlxSvdError, match="give"):
        call()
