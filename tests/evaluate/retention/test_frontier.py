"""Runs are read off at the uptake where they first arrive."""

import numpy as np
import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.retention import (
    at_uptake,
    difference_at_uptake,
    retained_at_uptake,
    uptake_reached,
)


def test_interpolation_is_numpys_on_a_rising_run():
    rng = np.random.default_rng(0)
    uptakes = np.sort(rng.random(6))
    values = rng.random((6, 9))
    for level in (0.3 * uptakes[0] + 0.7 * uptakes[1], uptakes[3], uptakes[5]):
        expected = [np.interp(level, uptakes, column) for column in values.T]
        np.testing.assert_allclose(at_uptake(uptakes, values, level), expected, atol=1e-12)


def test_the_first_crossing_counts():
    values = np.array([[0.0], [1.0], [2.0], [3.0]])
    assert at_uptake([0, 0.6, 0.2, 0.9], values, 0.3)[0] == pytest.approx(0.5)


def test_a_run_that_never_arrives_has_no_value():
    assert at_uptake([0, 0.2], np.zeros((2, 3)), 0.5) is None


def test_a_run_that_begins_above_the_level_is_refused():
    with pytest.raises(MlxSvdError, match=r"begins at 0.4 already"):
        at_uptake([0.4, 0.8], np.zeros((2, 3)), 0.2)
    with pytest.raises(MlxSvdError, match="2 uptakes for 3 points"):
        at_uptake([0.4, 0.8], np.zeros((3, 3)), 0.2)


def test_retention_at_an_uptake_counts_measured_facts_above_zero():
    margins = np.array([[2.0, 1.0, 1.0], [1.0, -1.0, -1.0]])
    found = retained_at_uptake([0, 1], margins, np.array([True, True, False]), 0.25)
    np.testing.assert_allclose(found, [1.0, 0.75])


def test_runs_are_compared_fact_by_fact():
    measured = np.array([True] * 6 + [False])
    a = np.array([[1.0] * 7, [-1, -1, -1, 1, 1, 1, -1]])
    b = np.array([[1.0] * 7, [-1, 1, 1, 1, 1, 1, 1]])
    found = difference_at_uptake([0, 0.8], a, [0, 0.4], b, measured, 0.4)
    # a is halfway: half of its three losses; b has arrived: its one.
    assert found.value == pytest.approx((6 - 1) / 6 - (6 - 1.5) / 6)
    assert found.low < found.value < found.high
    assert difference_at_uptake([0, 0.8], a, [0, 0.4], b, measured, 0.5) is None


def test_runs_can_be_compared_up_to_what_the_slowest_reached():
    assert uptake_reached([[0, 0.9, 0.5], [0, 0.4]]) == 0.4
