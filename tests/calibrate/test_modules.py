"""The loss of a quantized embedding or head is the divergence of a model that has it."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.calibrate.modules import BITS, module_losses
from mlx_svd.calibrate.text import Windows
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.source.source import open_source
from tests.tiny import VOCAB, write_tiny


@pytest.fixture
def windows() -> Windows:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 24)).astype(np.int32)
    return Windows(tokens, "random", "digest", 2)


def log_probs(model, tokens: np.ndarray) -> np.ndarray:
    logits = np.array(model(mx.array(tokens)).astype(mx.float32), dtype=np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_losses_are_divergences_from_the_original_and_the_model_is_left_as_it_was(
    tmp_path, windows
):
    folder = write_tiny("llama", tmp_path / "model", tie_word_embeddings=False)
    model, _ = load_model(folder, dtype="float32")
    original = log_probs(model, windows.tokens)
    losses = module_losses(model, open_source(str(folder)), windows)
    assert set(losses) == {"model.embed_tokens", "lm_head"}
    assert np.array_equal(log_probs(model, windows.tokens), original)
    for path, module in (
        ("model.embed_tokens", model.model.embed_tokens),
        ("lm_head", model.lm_head),
    ):
        assert set(losses[path]) == {str(bits) for bits in BITS}
        weight = module.weight
        packed = mx.quantize(weight, 64, 3)
        module.weight = mx.dequantize(*packed, group_size=64, bits=3)
        quantized = log_probs(model, windows.tokens)
        module.weight = weight
        expected = (np.exp(original) * (original - quantized)).sum(-1).mean()
        assert losses[path]["3"] == pytest.approx(expected, rel=1e-3)
        assert losses[path]["2"] > losses[path]["8"]


def test_projections_are_left_to_the_candidates(tmp_path, windows):
    folder = write_tiny("gpt2", tmp_path / "model")
    model, _ = load_model(folder, dtype="float32")
    source = open_source(str(folder))
    held = {linear.path for linear in source.linears}
    assert not held & set(module_losses(model, source, windows))
