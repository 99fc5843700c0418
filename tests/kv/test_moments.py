"""Moments are those of what mlx-lm's cache holds, and of the queries."""

import numpy as np
import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.moments import measure_moments
from mlx_svd.kv.observe import observed
from tests.kv.conftest import FAMILIES, windows
from tests.kv.reference import cached, rows


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_cached_keys_and_values(tiny, family):
    t = tiny(family)
    tokens = windows().tokens
    for moments, (keys, values) in zip(t.bases.layers, cached(t.model, tokens), strict=True):
        k, v = rows(keys), rows(values)
        assert moments.tokens == len(k) == tokens.size
        np.testing.assert_allclose(moments.keys, k.T @ k / len(k), atol=1e-5)
        np.testing.assert_allclose(moments.key_mean, k.mean(0), atol=1e-6)
        np.testing.assert_allclose(moments.second("V", True), np.cov(v.T, bias=True), atol=1e-5)
        np.testing.assert_allclose(moments.second("K", True), np.cov(k.T, bias=True), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_unrotated_keys_have_the_same_length_and_differ_where_a_model_rotates(tiny, family):
    t = tiny(family)
    with observed(t.model, t.type) as seen:
        t.model(t.tokens)
    for attended in seen:
        before, after = np.array(attended.unrotated), np.array(attended.keys)
        assert attended.rotary == (family not in ("gpt2", "gpt_neo"))
        # Rotations keep lengths; the first position is not rotated.
        np.testing.assert_allclose(
            np.linalg.norm(before, axis=-1), np.linalg.norm(after, axis=-1), rtol=1e-4
        )
        np.testing.assert_allclose(before[:, :, 0], after[:, :, 0], atol=1e-5)
        assert (np.abs(before - after).max() > 1e-2) == attended.rotary


def test_queries_of_a_group_are_added(tiny):
    t = tiny("llama")
    tokens = windows().tokens
    with observed(t.model, t.type) as seen:
        t.model(np_to_mx(tokens))
    for moments, attended in zip(t.bases.layers, seen, strict=True):
        q = np.array(attended.queries).astype(np.float64)
        dim = moments.head_dim
        for kv in range(2):
            mine = [q[:, h].reshape(-1, dim) for h in (2 * kv, 2 * kv + 1)]
            expected = sum(x.T @ x for x in mine) / len(mine[0])
            block = slice(kv * dim, (kv + 1) * dim)
            np.testing.assert_allclose(
                moments.queries[block, block], expected, rtol=1e-4, atol=1e-5
            )


def np_to_mx(tokens):
    import mlx.core as mx

    return mx.array(tokens)


def test_the_model_is_left_as_it_was(tiny):
    t = tiny("qwen2")
    before = np.array(t.model(t.tokens))
    types = [type(m) for _, m in t.model.named_modules()]
    measure_moments(t.model, t.type, windows(1))
    assert [type(m) for _, m in t.model.named_modules()] == types
    np.testing.assert_array_equal(np.array(t.model(t.tokens)), before)


def test_an_attention_that_computes_its_scores_itself_is_refused_by_name(tiny):
    with pytest.raises(MlxSvdError, match=r"gemma2\.Attention: computes its attention itself"):
        tiny("gemma2")
