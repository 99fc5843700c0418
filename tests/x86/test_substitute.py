"""What models compute inside the block, and that nothing of it stays."""

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.llama as llama
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_svd.checkpoint.loader import load_model
from mlx_svd.x86 import numpy_exponentials, pointwise, substitute
from tests.tiny import FAMILIES, VOCAB, write_tiny

TOKENS = mx.array(np.arange(2 * 24).reshape(2, 24) % VOCAB)


@pytest.fixture
def on_x86(monkeypatch):
    """Also where MLX's own exponentials are fast."""
    monkeypatch.setattr(substitute, "slow_exponentials", lambda: True)


@pytest.fixture
def calls(monkeypatch):
    """Names of numpy's functions, whenever one of them is called."""
    seen = []
    for owner, name in (
        (substitute, "attention"),
        (pointwise, "swiglu"),
        (pointwise, "gelu_approx"),
    ):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, n=name, f=original: seen.append(n) or f(*a))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_logits_and_gradients_of_mlx(family, tmp_path, on_x86, calls):
    model, _ = load_model(write_tiny(family, tmp_path / "model"), dtype="float32")
    gradient = nn.value_and_grad(model, lambda m: m(TOKENS).square().mean())
    expected, slopes = model(TOKENS), dict(tree_flatten(gradient(model)[1]))
    mx.eval(expected, slopes)
    assert not calls
    with numpy_exponentials(model):
        found, our_slopes = model(TOKENS), dict(tree_flatten(gradient(model)[1]))
    assert calls
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for name, slope in our_slopes.items():
        largest = max(1e-6, mx.abs(slopes[name]).max().item())
        np.testing.assert_allclose(slope, slopes[name], atol=1e-4 * largest, err_msg=name)


@pytest.mark.parametrize(("family", "function"), [("llama", "swiglu"), ("gpt2", "gelu_approx")])
def test_activations_are_numpy_s(family, function, tmp_path, on_x86, calls):
    model, _ = load_model(write_tiny(family, tmp_path / "model"), dtype="float32")
    with numpy_exponentials(model):
        model(TOKENS)
    assert {"attention", function} == set(calls)


def test_half_precision_is_mlx_s_own(tmp_path, on_x86, calls):
    model, _ = load_model(write_tiny("llama", tmp_path / "model"), dtype="bfloat16")
    expected = model(TOKENS)
    with numpy_exponentials(model):
        found = model(TOKENS)
    assert not calls
    assert mx.array_equal(found, expected)


def test_nothing_stays_after_the_block_whatever_happens_in_it(tmp_path, on_x86):
    model, _ = load_model(write_tiny("llama", tmp_path / "model"), dtype="float32")
    before = mx.fast.scaled_dot_product_attention, nn.gelu_approx, llama.swiglu
    with numpy_exponentials(model):
        outer = mx.fast.scaled_dot_product_attention, nn.gelu_approx, llama.swiglu
        with numpy_exponentials(model):
            model(TOKENS)
        assert (mx.fast.scaled_dot_product_attention, nn.gelu_approx, llama.swiglu) == outer
    with pytest.raises(RuntimeError, match="stop"), numpy_exponentials(model):
        raise RuntimeError("stop")
    assert (mx.fast.scaled_dot_product_attention, nn.gelu_approx, llama.swiglu) == before
    assert not set(before) & set(outer)


def test_nothing_changes_where_exponentials_are_fast(tmp_path, monkeypatch, calls):
    monkeypatch.setattr(substitute, "slow_exponentials", lambda: False)
    model, _ = load_model(write_tiny("llama", tmp_path / "model"), dtype="float32")
    with numpy_exponentials(model):
        model(TOKENS)
    assert not calls


def test_a_model_s_own_compiled_functions_keep_mlx_s_activations(on_x86, calls):
    compiled = mx.compile(lambda x: nn.gelu_approx(x) * 2)
    x = mx.array([[0.5, -1.0]])
    expected = 2 * nn.gelu_approx(x)
    with numpy_exponentials(nn.Linear(2, 2)):
        found = compiled(x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not calls


def test_boolean_and_additive_masks_and_sinks_are_those_of_mlx(on_x86):
    rng = np.random.default_rng(0)
    queries, keys, values = (
        mx.array(rng.standard_normal(shape), mx.float32)
        for shape in ((2, 6, 5, 8), (2, 3, 9, 8), (2, 3, 9, 8))
    )
    allowed = rng.random((2, 1, 5, 9)) < 0.6
    allowed[0, 0, 2] = False
    heads = rng.standard_normal((2, 6, 5, 9)).astype(np.float32)
    stock = mx.fast.scaled_dot_product_attention
    cases = [{"mask": None}, {"mask": "causal"}, {"mask": mx.array(allowed)},
             {"mask": mx.array(allowed[0, 0])}, {"mask": mx.array(heads)},
             {"sinks": mx.zeros((6,))}]  # fmt: skip
    for options in cases:
        expected = stock(queries, keys, values, scale=0.4, **options)
        with numpy_exponentials(nn.Linear(2, 2)):
            found = mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=0.4, **options
            )
        np.testing.assert_allclose(found, expected, atol=2e-6)
