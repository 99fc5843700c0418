"""Activations and losses against MLX's own, values and gradients, and against float64."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.activations import swiglu
from scipy.special import logsumexp

from mlx_svd.x86 import cross_entropy, pointwise
from mlx_svd.x86 import logsumexp as best_logsumexp

# Several blocks for each thread, the last one short.
SHAPE = (5, 29, 1021)


def random(seed=0, shape=SHAPE, scale=3):
    return mx.array(np.random.default_rng(seed).standard_normal(shape) * scale, mx.float32)


def mean_cross_entropy(logits):
    targets = mx.array(np.arange(5 * 29).reshape(5, 29))
    return nn.losses.cross_entropy(logits, targets)[..., None]


def our_cross_entropy(logits):
    targets = mx.array(np.arange(5 * 29).reshape(5, 29))
    return pointwise.cross_entropy(logits, targets)[..., None]


@pytest.mark.parametrize(
    ("ours", "stock", "inputs"),
    [
        (pointwise.swiglu, swiglu, 2),
        (pointwise.gelu_approx, nn.gelu_approx, 1),
        (lambda x: pointwise.logsumexp(x)[..., None], lambda x: mx.logsumexp(x, -1, True), 1),
        (our_cross_entropy, mean_cross_entropy, 1),
    ],
    ids=["swiglu", "gelu_approx", "logsumexp", "cross_entropy"],
)
def test_values_and_gradients_are_those_of_mlx(ours, stock, inputs):
    arrays, weights = [random(k) for k in range(inputs)], random(7)

    def weighted(function):
        return lambda *arrays: (function(*arrays) * weights).mean()

    np.testing.assert_allclose(ours(*arrays), stock(*arrays), rtol=1e-5, atol=1e-5)
    places = tuple(range(inputs))
    found, expected = (mx.grad(weighted(f), argnums=places)(*arrays) for f in (ours, stock))
    found, expected = ((g,) if isinstance(g, mx.array) else g for g in (found, expected))
    largest = max(mx.abs(b).max().item() for b in expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * largest)


def test_losses_are_those_of_float64():
    logits = random(scale=10)
    expected = logsumexp(np.array(logits, np.float64), axis=-1)
    np.testing.assert_allclose(pointwise.logsumexp(logits), expected, rtol=2e-7)
    targets = np.zeros((5, 29), np.int32)
    losses = expected - np.array(logits[..., 0], np.float64)
    np.testing.assert_allclose(
        pointwise.cross_entropy(logits, mx.array(targets)), losses, rtol=1e-6, atol=1e-6
    )


def test_extreme_gates_neither_warn_nor_become_nan(recwarn):
    gates = mx.array([-1e4, -200.0, -0.0, 200.0, 1e4])
    np.testing.assert_allclose(
        pointwise.swiglu(gates, mx.ones_like(gates)), [0, 0, 0, 200, 1e4], atol=1e-30
    )
    gradient = mx.grad(lambda g: pointwise.swiglu(g, mx.ones_like(g)).sum())(gates)
    np.testing.assert_allclose(gradient, [0, 0, 0.5, 1, 1], atol=1e-30)
    np.testing.assert_allclose(pointwise.gelu_approx(gates), [0, 0, 0, 200, 1e4], atol=1e-30)
    assert not recwarn.list


def test_nan_and_infinity_are_passed_on():
    logits = mx.array([[1.0, float("nan")], [1.0, float("inf")], [1.0, 2.0]])
    for losses in (best_logsumexp(logits), cross_entropy(logits, mx.array([0, 0, 0]))):
        assert np.isfinite(np.array(losses)).tolist() == [False, False, True]


def test_half_precision_losses_are_mlx_s_own():
    logits = random(shape=(4, 50)).astype(mx.bfloat16)
    targets = mx.array([1, 2, 3, 4])
    assert best_logsumexp(logits).dtype == mx.bfloat16
    assert mx.array_equal(cross_entropy(logits, targets), nn.losses.cross_entropy(logits, targets))
