"""Bases against the definitions of their papers, on collected activations."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.basis import gauge
from mlx_svd.kv.components import key_components, value_components
from mlx_svd.kv.observe import observed
from tests.kv.conftest import windows
from tests.kv.reference import cached, rows

RANK = 5


def output_weight(t, layer: int) -> np.ndarray:
    return np.array(t.model.layers[layer].self_attn.o_proj.weight).astype(np.float64)


def test_kq_is_the_best_approximation_of_the_scores(tiny):
    """KQ-SVD: the truncated SVD of K Qᵀ is the optimum for one head (arXiv 2512.05916)."""
    t = tiny("gpt2")
    tokens = windows().tokens
    with observed(t.model, t.type) as seen:
        t.model(mx.array(tokens))
    for layer, (moments, attended) in enumerate(zip(t.bases.layers, seen, strict=True)):
        parts = key_components(moments, "kq", 1)
        keys = cached(t.model, tokens)[layer][0]
        queries = np.array(attended.queries).astype(np.float64)
        for head in range(4):
            k, q = rows(keys[:, head : head + 1]), rows(queries[:, head : head + 1])
            k = k - k.mean(0)
            through = parts.encode[head][:, :RANK] @ parts.decode[head][:RANK]
            got = np.linalg.norm(k @ q.T - k @ through @ q.T) ** 2
            best = (np.linalg.svd(k @ q.T, compute_uv=False)[RANK:] ** 2).sum()
            assert got == pytest.approx(best, rel=1e-3)


def test_joint_is_the_svd_of_stacked_keys_and_queries(tiny):
    t = tiny("gpt2")
    tokens = windows().tokens
    with observed(t.model, t.type) as seen:
        t.model(mx.array(tokens))
    moments, keys = t.bases.layers[0], rows(np.array(seen[0].keys).astype(np.float64))
    queries = rows(np.array(seen[0].queries).astype(np.float64))
    parts = key_components(moments, "joint", None)
    _, s, vt = np.linalg.svd(np.vstack([keys - keys.mean(0), queries]), full_matrices=False)
    np.testing.assert_allclose(parts.energies[0] * len(keys), s**2, rtol=1e-3, atol=1e-3)
    through = parts.encode[0][:, :RANK] @ parts.decode[0][:RANK]
    np.testing.assert_allclose(through, vt[:RANK].T @ vt[:RANK], atol=1e-3)


def test_weighted_values_have_the_least_error_at_the_output(tiny):
    """Of one head: the truncated SVD of V W_oᵀ is the optimum."""
    t = tiny("llama", num_key_value_heads=4)
    moments, weight = t.bases.layers[1], output_weight(t, 1)
    parts = value_components(moments, "output", 1, weight)
    plain = value_components(moments, "pca", 1, weight)
    values = cached(t.model, windows().tokens)[1][1]
    for head in range(4):
        v = rows(values[:, head : head + 1])
        v = v - v.mean(0)
        w = weight[:, head * 16 : (head + 1) * 16]

        def error(c, h=head, v=v, w=w):
            return np.linalg.norm((v - v @ c.encode[h][:, :RANK] @ c.decode[h][:RANK]) @ w.T) ** 2

        best = (np.linalg.svd(v @ w.T, compute_uv=False)[RANK:] ** 2).sum()
        assert error(parts) == pytest.approx(best, rel=1e-3)
        assert error(plain) >= best * (1 - 1e-6)


@pytest.mark.parametrize("group", [1, 2, None])
@pytest.mark.parametrize("kind", ["pca", "joint", "kq"])
def test_all_components_together_change_nothing(tiny, kind, group):
    parts = key_components(tiny("qwen2").bases.layers[0], kind, group)
    for encode, decode in zip(parts.encode, parts.decode, strict=True):
        np.testing.assert_allclose(encode @ decode, np.eye(len(encode)), atol=1e-8)


def test_a_gauge_changes_the_numbers_but_not_what_they_say():
    rng = np.random.default_rng(0)
    encode, decode = rng.standard_normal((8, 4)), rng.standard_normal((4, 8))
    energies = np.array([1e4, 10.0, 1.0, 1e-3])
    for known in (None, energies):
        turned, back = gauge(known, encode, decode, 1)
        np.testing.assert_allclose(turned @ back, encode @ decode, atol=1e-10)
    # With it, latent and query numbers have equal variances: sqrt(energy) before the rotation.
    z = np.diag(np.sqrt(energies))
    balanced, _ = gauge(energies, z, np.linalg.inv(z), 1)
    np.testing.assert_allclose(
        np.linalg.svd(balanced, compute_uv=False) ** 2, np.sqrt(energies), rtol=1e-6
    )


def test_bad_kinds_and_groups_are_refused(tiny):
    moments = tiny("qwen2").bases.layers[0]
    with pytest.raises(MlxSvdError, match="--kv-keys svd: use pca, joint, kq"):
        key_components(moments, "svd", 1)
    with pytest.raises(MlxSvdError, match="--kv-values kq: use pca, output"):
        value_components(moments, "kq", 1, np.eye(64))
    with pytest.raises(MlxSvdError, match="--kv-group 3: does not divide the model's 2"):
        key_components(moments, "kq", 3)
