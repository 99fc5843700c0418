"""Perplexity and generation against plain computations."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.checkpoint.loader import load, load_model
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.generation.generate import generate
from mlx_svd.evaluate.likelihood import forward
from mlx_svd.evaluate.perplexity import perplexity, perplexity_of, ratio, window_losses
from tests.evaluate.reference import losses
from tests.tiny import VOCAB, write_tiny


@pytest.fixture
def model(tmp_path):
    return load_model(write_tiny("llama", tmp_path / "model"))[0]


def random_windows(count, length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (count, length), dtype=np.int32)


def test_perplexity_is_exp_of_the_mean_negative_log_likelihood_in_numpy(model):
    tokens = np.random.default_rng(0).integers(0, VOCAB, 100).tolist()
    expected = np.concatenate([losses(model, tokens[s : s + 32]) for s in (0, 32, 64)])
    result = perplexity(model, tokens, window=32)  # the rest of 4 tokens is left out
    assert result.tokens == len(expected)
    assert result.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    assert result.low < result.perplexity < result.high


def test_a_rest_of_a_quarter_window_is_scored(model):
    tokens = np.random.default_rng(0).integers(0, VOCAB, 72).tolist()
    expected = np.concatenate([losses(model, tokens[s : s + 32]) for s in (0, 32, 64)])
    result = perplexity(model, tokens, window=32)
    assert result.tokens == 31 + 31 + 7
    assert result.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_window_losses_do_not_depend_on_the_batch(model, batch, monkeypatch):
    windows = random_windows(5, 24)
    monkeypatch.setattr(forward, "LOGIT_BYTES", batch * 4 * VOCAB * 24)
    found = window_losses(model, windows)
    assert found.sums == pytest.approx([losses(model, w).sum() for w in windows], rel=1e-5)
    assert found.counts.tolist() == [23] * 5


def test_ratio_is_that_of_the_perplexities_and_its_pairing_narrows_the_interval(tmp_path, model):
    windows = random_windows(6, 24)
    other, _ = load_model(write_tiny("llama", tmp_path / "other"))
    other.update({"lm_head": {"weight": other.lm_head.weight * 1.01}})
    base, changed = window_losses(model, windows), window_losses(other, windows)
    result = ratio(changed, base)
    a, b = perplexity_of(changed), perplexity_of(base)
    assert result.ratio == pytest.approx(a.perplexity / b.perplexity)
    assert result.low < result.ratio < result.high
    assert result.windows == 6
    assert result.high / result.low < 0.5 * (a.high / a.low - 1) + 1


def test_ratio_of_a_model_to_itself_is_one_without_doubt(model):
    base = window_losses(model, random_windows(4, 16))
    result = ratio(base, base)
    assert (result.ratio, result.low, result.high) == (1, 1, 1)


def test_ratio_refuses_losses_of_other_windows(model):
    with pytest.raises(MlxSvdError, match="different windows"):
        ratio(
            window_losses(model, random_windows(4, 16)), window_losses(model, random_windows(3, 16))
        )


def test_one_window_claims_no_certainty(model):
    result = perplexity_of(window_losses(model, random_windows(1, 16)))
    assert (result.low, result.high) == (0, math.inf)


def test_a_nan_in_the_model_names_the_window(model):
    model.update({"lm_head": {"weight": mx.full(model.lm_head.weight.shape, mx.nan)}})
    with pytest.raises(MlxSvdError, match="window 0: the loss is nan"):
        window_losses(model, random_windows(2, 16))


def test_ids_beyond_the_vocabulary_are_refused(model):
    with pytest.raises(MlxSvdError, match=f"token id {VOCAB} is beyond"):
        window_losses(model, np.array([[1, 2, VOCAB]]))


def test_a_text_without_a_quarter_of_a_window_is_refused(model):
    with pytest.raises(MlxSvdError, match="text of 7 tokens"):
        perplexity(model, list(range(7)), window=32)


def test_writing_out_a_quantized_model_keeps_its_losses(tmp_path):
    from mlx.nn import quantize

    model, _ = load_model(write_tiny("llama", tmp_path / "q", intermediate_size=128))
    windows = random_windows(2, 24)
    before = window_losses(model, windows).sums
    quantize(model, group_size=32, bits=3)
    quantized = window_losses(model, windows).sums
    written = window_losses(forward.written_out(model), windows).sums
    assert written == pytest.approx(quantized, rel=1e-5)
    assert written != pytest.approx(before, rel=1e-3)


def test_greedy_generation_is_the_argmax_of_the_model():
    model, tokenizer = load(DEMO_MODEL, dtype="float32")
    prompt = "It was a dark night, and the old man"
    tokens = tokenizer.encode(prompt)
    for _ in range(8):
        tokens.append(int(mx.argmax(model(mx.array(tokens)[None])[0, -1]).item()))
    result = generate(model, tokenizer, prompt, max_tokens=8)
    assert result.generation_tokens == 8
    expected = tokenizer.decode(tokens[-8:])
    assert result.text.strip() == expected.strip()
