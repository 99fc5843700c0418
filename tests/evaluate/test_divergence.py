"""KL divergence and agreement against numpy, with and without kept predictions."""

import numpy as np
import pytest

from mlx_svd.checkpoint.loader import load_model
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.divergence import base_distribution, kl_divergence
from mlx_svd.evaluate.likelihood import forward
from mlx_svd.evaluate.perplexity import window_losses
from tests.evaluate.reference import log_probs
from tests.tiny import VOCAB, write_tiny

WINDOWS = np.random.default_rng(0).integers(0, VOCAB, (5, 24), dtype=np.int32)


@pytest.fixture
def models(tmp_path):
    """(base, another model near it)."""
    base, _ = load_model(write_tiny("llama", tmp_path / "base"))
    other, _ = load_model(write_tiny("llama", tmp_path / "other"))
    weight = other.layers[0].mlp.down_proj.weight
    other.layers[0].mlp.down_proj.weight = weight * -1.0
    return base, other


def reference(base, other):
    """(mean KL, agreement) over all positions."""
    kl, agree = [], []
    for window in WINDOWS:
        p, q = log_probs(base, window), log_probs(other, window)
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        agree.append(p.argmax(axis=1) == q.argmax(axis=1))
    return np.mean(kl), np.mean(agree)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_divergence_is_that_of_numpy(models, batch, monkeypatch):
    base, other = models
    monkeypatch.setattr(forward, "LOGIT_BYTES", batch * 4 * VOCAB * 24)
    kl, agreement = reference(base, other)
    found = kl_divergence(other, base, WINDOWS)
    assert kl > 1e-3
    assert 0.1 < agreement < 1
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.agreement == pytest.approx(agreement)
    assert found.tokens == 5 * 23
    assert found.kl_low < found.kl < found.kl_high
    assert found.agreement_low < found.agreement < found.agreement_high
    expected = window_losses(other, WINDOWS)
    np.testing.assert_allclose(found.losses.sums, expected.sums, rtol=1e-5)
    np.testing.assert_array_equal(found.losses.counts, expected.counts)


@pytest.mark.parametrize(("dtype", "limit"), [(np.float16, 1e-2), (np.float32, 1e-5)])
def test_kept_predictions_give_the_same_divergence(models, dtype, limit):
    base, other = models
    kept = base_distribution(base, WINDOWS, dtype)
    assert kept.log_probs.dtype == dtype
    assert kept.log_probs.shape == (5, 23, VOCAB)
    found, expected = kl_divergence(other, kept, WINDOWS), kl_divergence(other, base, WINDOWS)
    assert found.kl == pytest.approx(expected.kl, rel=limit)
    assert found.agreement == expected.agreement


@pytest.mark.parametrize("keep", [False, True])
def test_a_model_does_not_diverge_from_itself(models, keep):
    base, _ = models
    found = kl_divergence(base, base_distribution(base, WINDOWS) if keep else base, WINDOWS)
    assert abs(found.kl) < 1e-6
    assert found.agreement == 1


def test_predictions_kept_for_other_windows_are_refused(models):
    base, other = models
    with pytest.raises(MlxSvdError, match="kept for other windows"):
        kl_divergence(other, base_distribution(base, WINDOWS[:4]), WINDOWS)


def test_models_of_two_vocabularies_are_refused(models, tmp_path):
    larger, _ = load_model(write_tiny("llama", tmp_path / "larger", vocab_size=VOCAB + 8))
    with pytest.raises(MlxSvdError, match="compare models of one vocabulary"):
        kl_divergence(larger, models[0], WINDOWS)
