"""Attention against numpy in float64 and against MLX's own, values and gradients."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.x86 import attention as module
from mlx_svd.x86.attention import attention

TEXTS, HEADS, GROUP, SIZE, SCALE = 3, 2, 3, 8, 0.3


def random_arrays(length, positions, seed=0):
    """queries (B, K, G, L, D), keys, values (B, K, S, D), cotangent of the output."""
    rng = np.random.default_rng(seed)
    shapes = [(TEXTS, HEADS, GROUP, length, SIZE), *[(TEXTS, HEADS, positions, SIZE)] * 2]
    return [rng.standard_normal(s).astype(np.float32) for s in (*shapes, shapes[0])]


def reference(queries, keys, values, bias):
    """In float64, every score written out."""
    queries, keys, values = (a.astype(np.float64) for a in (queries, keys, values))
    scores = SCALE * np.einsum("bkgld,bksd->bkgls", queries, keys) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bkgls,bksd->bkgld", weights, values)


def causal_bias(length, positions):
    return np.triu(np.full((length, positions), -np.inf), positions - length + 1)


def biases(length, positions):
    """Shapes that broadcast to (B, K, G, L, S): for all, for each text, for each head."""
    rng = np.random.default_rng(1)
    for shape in ((1, 1), (length, positions), (TEXTS, 1, 1, length, positions),
                  (1, HEADS, GROUP, length, positions)):  # fmt: skip
        yield rng.standard_normal(shape).astype(np.float32)


@pytest.fixture(params=["one block", "several blocks, one head of one text at a time"])
def blocks(request, monkeypatch):
    if request.param != "one block":
        monkeypatch.setattr(module, "QUERIES", 4)
        monkeypatch.setattr(module, "SCORES", 1)


@pytest.mark.parametrize(("length", "positions"), [(1, 1), (1, 9), (11, 11), (7, 13)])
def test_outputs_are_those_of_float64(length, positions, blocks):
    queries, keys, values, _ = random_arrays(length, positions)
    given = [mx.array(a) for a in (queries, keys, values)]
    for bias in biases(length, positions):
        found = np.array(attention(SCALE, False)(*given, mx.array(bias)))
        np.testing.assert_allclose(found, reference(queries, keys, values, bias), atol=2e-6)
    found = np.array(attention(SCALE, True)(*given, mx.zeros((1, 1))))
    expected = reference(queries, keys, values, causal_bias(length, positions))
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(("length", "positions"), [(1, 9), (11, 11), (7, 13)])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_mlx(length, positions, causal, blocks):
    *arrays, weights = (mx.array(a) for a in random_arrays(length, positions))
    bias = mx.array(np.random.default_rng(2).standard_normal((length, positions)), mx.float32)

    def stock(queries, keys, values):
        flat = queries.reshape(TEXTS, HEADS * GROUP, length, SIZE)
        found = mx.fast.scaled_dot_product_attention(
            flat, keys, values, scale=SCALE, mask="causal" if causal else bias
        )
        return (found.reshape(weights.shape) * weights).sum()

    def ours(queries, keys, values):
        return (attention(SCALE, causal)(queries, keys, values, bias) * weights).sum()

    expected, found = (mx.grad(f, argnums=(0, 1, 2))(*arrays) for f in (stock, ours))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-5)


def test_one_and_two_threads_give_the_same_bits(monkeypatch):
    arrays = [mx.array(a) for a in random_arrays(200, 200)[:3]]
    several = np.array(attention(SCALE, True)(*arrays, mx.zeros((1, 1))))
    monkeypatch.setattr(module, "in_parts", lambda function, parts: list(map(function, parts)))
    one = np.array(attention(SCALE, True)(*arrays, mx.zeros((1, 1))))
    assert several.tobytes() == one.tobytes()
