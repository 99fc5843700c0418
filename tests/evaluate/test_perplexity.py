"""Perplexity and generation against plain computations."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.checkpoint.loader import load, load_model
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.evaluate.generate import generate
from mlx_svd.evaluate.perplexity import perplexity
from tests.tiny import VOCAB, write_tiny


def test_perplexity_is_exp_of_the_mean_negative_log_likelihood_in_numpy(tmp_path):
    model, _ = load_model(write_tiny("llama", tmp_path / "model"))
    tokens = np.random.default_rng(0).integers(0, VOCAB, 100).tolist()
    total, count = 0.0, 0
    for window in (tokens[:32], tokens[32:64], tokens[64:96]):
        logits = np.array(model(mx.array(window)[None])[0], dtype=np.float64)
        log_z = np.log(np.exp(logits).sum(axis=1))
        for position, token in enumerate(window[1:]):
            total += log_z[position] - logits[position, token]
            count += 1
    result = perplexity(model, tokens, window=32)
    assert result.tokens == count
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert result.low < result.perplexity < result.high


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
