"""Cliffs and slopes that are known."""

import numpy as np
import pytest

from mlx_svd.analyze.change_point import change_point
from mlx_svd.analyze.layers import rank_correlation
from mlx_svd.analyze.power_law import power_law
from mlx_svd.errors import MlxSvdError

X = np.linspace(-6, -0.5, 20)


def damage(curve, windows=12, noise=0.1, seed=0):
    """(K, N): a curve in logarithms, with window factors and noise."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(0, 0.3, windows)
    return np.exp(curve[:, None] + factors + rng.normal(0, noise, (len(curve), windows)))


@pytest.mark.parametrize("power", [0.7, 1.0, 3.0])
def test_a_power_law_is_a_slope_however_steep(power):
    found = change_point(X, damage(power * X))
    assert found.verdict == "slope"
    assert found.slope.low < power < found.slope.high
    assert found.factor.low < 1.2
    assert found.points == 20
    assert found.windows == 12


def test_a_kink_is_a_cliff_and_is_found_where_it_is():
    curve = X + 4 * np.maximum(X + 2, 0)
    found = change_point(X, damage(curve))
    assert found.verdict == "cliff"
    assert found.break_x.value == pytest.approx(-2, abs=0.2)
    assert found.before.low < 1 < found.before.high
    assert found.after.low < 5 < found.after.high
    assert found.rms_broken < 0.3 * found.rms_line


def test_saturation_is_no_cliff():
    found = change_point(X, damage(3 * X - 2 * np.maximum(X + 3, 0)))
    assert found.verdict == "slope"
    assert found.factor.high < 1


def test_few_noisy_windows_decide_nothing():
    curve = X + 1.1 * np.maximum(X + 2, 0)
    assert change_point(X, damage(curve, windows=3, noise=1.0)).verdict == "undecided"


def test_without_noise_both_fits_are_numpys():
    curve = 2 * X + 1
    found = change_point(X, np.exp(np.repeat(curve[:, None], 4, axis=1)))
    assert found.slope.value == pytest.approx(np.polyfit(X, curve, 1)[0])
    assert found.rms_line == pytest.approx(0, abs=1e-9)
    assert found.factor.value == pytest.approx(1, abs=1e-6)


def test_too_few_points_and_no_damage_are_refused():
    with pytest.raises(MlxSvdError, match="at least 8 ranks"):
        change_point(X[:5], damage(X[:5]))
    with pytest.raises(MlxSvdError, match="no measurable KL"):
        change_point(X, np.zeros((20, 3)))


@pytest.mark.parametrize(
    ("power", "law"), [(-0.5, "average out"), (0.5, "independent"), (1, "one")]
)
def test_the_exponent_of_a_known_law_is_found(power, law):
    k = np.arange(1, 9)
    rng = np.random.default_rng(1)
    totals = rng.uniform(5, 10, 12)
    noise = np.exp(rng.normal(0, 0.1, (8, 8, 12)))
    squares = 0.01 * k[None, :, None] ** (2.0 * power) * totals * noise
    found = power_law(squares, totals, k)
    assert found.exponent.low < power < found.exponent.high
    assert any(law in text for text in found.contained)
    assert len(found.excluded) == 3
    np.testing.assert_allclose(found.error, 0.1 * k**power, rtol=0.05)


def test_a_law_of_two_points_is_refused():
    with pytest.raises(MlxSvdError, match="three layers or more"):
        power_law(np.ones((2, 2, 3)), np.ones(3), [1, 2])


def test_rank_correlation_is_scipys_with_an_interval_around_it():
    rng = np.random.default_rng(0)
    a = rng.standard_normal(30)
    found = rank_correlation(a, a + 0.5 * rng.standard_normal(30))
    assert 0.5 < found["low"] < found["rho"] < found["high"] <= 1
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1])["rho"] == -1
    with pytest.raises(MlxSvdError, match="three or more"):
        rank_correlation([1, 2], [1, 2])
