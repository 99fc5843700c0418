"""The target of a sequential calibration against least squares written out."""

import numpy as np

from mlx_svd.calibrate.statistics import TARGET_DAMPING, Statistics


def test_target_is_the_ridge_regression_of_the_original_outputs():
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((6, 10)), rng.standard_normal((500, 10))
    original = x @ (np.eye(10) + 0.1 * rng.standard_normal((10, 10)))
    second = x.T @ x / len(x)
    drift = (original - x).T @ x / len(x)
    statistics = Statistics(second, x.mean(0), np.abs(x).mean(0), drift=drift)
    # The change of W is a ridge regression of what the changed inputs lack in the outputs.
    ridge = TARGET_DAMPING * np.trace(second) / 10 * len(x)
    rows = np.concatenate([x, np.sqrt(ridge) * np.eye(10)])
    missing = np.concatenate([(original - x) @ weight.T, np.zeros((10, 6))])
    change = np.linalg.lstsq(rows, missing, rcond=None)[0].T
    found = statistics.target(weight)
    np.testing.assert_allclose(found, weight + change, rtol=1e-10)
    error = [np.square(original @ weight.T - x @ w.T).sum() for w in (weight, found)]
    assert error[1] < 0.5 * error[0]


def test_target_without_drift_is_the_weight():
    weight = np.ones((2, 3))
    statistics = Statistics(np.eye(3), np.zeros(3), np.ones(3))
    assert statistics.target(weight) is weight
