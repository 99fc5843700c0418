"""Attention probabilities are those that the model uses."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.analyze.attention import attention_calls, compare_attention, recorded_attention
from mlx_svd.analyze.truncations import Truncations
from mlx_svd.calibrate.taps import inputs_of, tapped
from mlx_svd.errors import MlxSvdError

LENGTH = 24


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def values_of(s, layer):
    """(H_kv, L, d) of the first window, from the projection itself."""
    p = next(p for p in s.projections.values() if p.name == "v" and p.layer == layer)
    linear = s.linear_of[p.path]
    with tapped(s.model, [linear]) as taps:
        s.model(mx.array(s.windows.tokens[:1]))
        (x,) = inputs_of(taps)
    x = np.array(x, dtype=np.float64)
    values = x @ s.weight(p.path).T.astype(np.float64)
    if p.bias:
        parts = linear.split(s.modules[linear.path].bias)
        values = values + np.array(parts["v"], dtype=np.float64)
    return values.reshape(LENGTH, p.heads, -1).transpose(1, 0, 2)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "gpt_neo", "gpt_neox", "gemma3_text"])
def test_probabilities_times_values_are_the_output_of_attention(subject, family):
    s = subject(family, length=LENGTH)
    calls = attention_calls(s.model, s.windows.tokens[0])
    assert len(calls) == s.layers
    for layer, call in enumerate(calls):
        probabilities = softmax(np.array(call.scores(), dtype=np.float64)[0])
        assert not np.triu(probabilities, 1).any()
        values = values_of(s, layer)
        values = np.repeat(values, len(probabilities) // len(values), axis=0)
        expected = np.array(call.output, dtype=np.float64)[0]
        np.testing.assert_allclose(probabilities @ values, expected, atol=1e-5)


def test_gpt_neo_has_no_scale_and_a_window_in_every_second_layer(subject):
    s = subject("gpt_neo", length=LENGTH)
    calls = attention_calls(s.model, s.windows.tokens[0])
    assert [call.scale for call in calls] == [1.0, 1.0]
    seen = [np.isfinite(np.array(call.scores())[0, 0]).sum(axis=1) for call in calls]
    np.testing.assert_array_equal(seen[0], np.arange(1, LENGTH + 1))
    np.testing.assert_array_equal(seen[1], np.minimum(np.arange(1, LENGTH + 1), 16))


def test_differences_are_numpys(subject):
    s = subject("gpt_neo", length=LENGTH)
    dense = attention_calls(s.model, s.windows.tokens[0])
    path = next(p.path for p in s.projections.values() if p.name == "q" and p.layer == 0)
    with Truncations(s).compressed({path: 3}):
        now = attention_calls(s.model, s.windows.tokens[0])
    for a, b in zip(dense, now, strict=True):
        found = compare_attention(a, b)
        s_a, s_b = (np.array(c.scores(), dtype=np.float64)[0] for c in (a, b))
        p, q = softmax(s_a), softmax(s_b)
        seen = np.isfinite(s_a)
        kl = (p[seen] * np.log(p[seen] / q[seen])).sum()
        assert found.kl == pytest.approx(kl, rel=1e-3, abs=1e-5)
        assert found.queries == 4 * LENGTH
        assert found.probabilities[0] == pytest.approx(((p - q) ** 2).sum(), rel=1e-3, abs=1e-9)
        difference = total = 0.0
        for h in range(4):
            for i in range(LENGTH):
                row_a, row_b = (x[h, i][seen[h, i]] for x in (s_a, s_b))
                row_a, row_b = row_a - row_a.mean(), row_b - row_b.mean()
                difference += ((row_a - row_b) ** 2).sum()
                total += (row_a**2).sum()
        assert found.scores[0] == pytest.approx(difference, rel=1e-3, abs=1e-6)
        assert found.scores[1] == pytest.approx(total, rel=1e-3)
    assert compare_attention(dense[0], now[0]).kl > 1e-3
    assert compare_attention(dense[0], dense[0]).kl == 0


def test_attention_that_is_computed_otherwise_is_refused(subject):
    s = subject("gemma2")
    with pytest.raises(MlxSvdError, match="leave attention out"), recorded_attention(s.model):
        pass
