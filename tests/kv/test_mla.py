"""Joint latents of keys and values, with some rotary pairs kept."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.mla import attach_mla
from mlx_svd.kv.with_cache import WithCache, WrittenOutKVCache, measured_bytes
from tests.conftest import relative_difference
from tests.kv.test_cache import stepwise


@pytest.fixture
def joint():
    """attach_mla(...), undone after the test."""
    made = []

    def run(t, rank, pairs=0, **options):
        made.append(attach_mla(t.model, t.type, t.bases, rank, pairs, **options))
        return made[-1]

    yield run
    for attachment in made:
        attachment.detach()


@pytest.mark.parametrize(("family", "rank"), [("llama", 32), ("qwen2", 32), ("qwen3", 64)])
def test_all_pairs_and_a_full_latent_give_the_dense_logits(tiny, joint, family, rank):
    t = tiny(family)
    dense = np.array(t.model(t.tokens))
    joint(t, rank, t.heads[0][1] // 2)
    assert relative_difference(stepwise(t.model, t.tokens, 30), dense) < 2e-5


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
def test_without_rotation_the_hidden_size_is_enough(tiny, joint, family):
    """[W_K; W_V] has 64 columns, so 64 numbers hold the 128 of keys and values."""
    t = tiny(family)
    dense = np.array(t.model(t.tokens))
    attachment = joint(t, 64)
    assert attachment.bytes_per_token == 2 * 64 * 4
    assert measured_bytes(make_prompt_cache(t.model), t.heads, mx.float32) == 2 * 64 * 4
    # Directions that hold no energy are left to rounding.
    assert relative_difference(stepwise(t.model, t.tokens, 30), dense) < 1e-3
    attachment.detach()
    joint(t, 24)
    assert relative_difference(np.array(t.model(t.tokens)), dense) > 1e-3


@pytest.mark.parametrize("pairs", [0, 3, 8])
def test_decoding_equals_one_pass_and_a_latent_is_read(tiny, joint, pairs):
    t = tiny("qwen2")
    joint(t, 20, pairs)
    whole = np.array(t.model(t.tokens))
    assert relative_difference(stepwise(t.model, t.tokens, 30), whole) < 2e-5
    caches = make_prompt_cache(t.model)
    mx.eval(t.model(t.tokens[:, :30], cache=caches))
    caches[1].values[:, :, 3] = caches[1].values[:, :, 3] + 1
    got = np.array(t.model(t.tokens[:, 30:31], cache=caches))
    assert relative_difference(got, whole[:, 30:31]) > 1e-4


def test_a_dropped_rotation_is_what_changes_the_model(tiny, joint):
    """A full latent with some pairs kept equals dense attention with the other pairs unrotated."""
    t = tiny("llama")
    attachment = joint(t, 2 * 32 - 2 * 2 * 5, 5)
    got = np.array(t.model(t.tokens))
    attachment.detach()
    originals = [layer.self_attn.rope for layer in t.model.layers]
    for layer, basis in zip(t.model.layers, attachment.bases, strict=True):
        layer.self_attn.rope = _some_pairs(basis.pairs)
    expected = np.array(t.model(t.tokens))
    for layer, rope in zip(t.model.layers, originals, strict=True):
        layer.self_attn.rope = rope
    assert relative_difference(got, expected) < 5e-5
    assert relative_difference(got, np.array(t.model(t.tokens))) > 1e-3


def _some_pairs(pairs):
    """Rotation by its definition, of the pairs (i, i + 8) of a head of 16 dimensions."""

    def rotate(x, offset=0):
        x = np.array(x)
        positions = np.arange(x.shape[2]) + offset
        out = x.copy()
        for i in pairs:
            angle = positions * 10000.0 ** (-i / 8)
            a, b = x[..., i], x[..., i + 8]
            out[..., i] = a * np.cos(angle) - b * np.sin(angle)
            out[..., i + 8] = a * np.sin(angle) + b * np.cos(angle)
        return mx.array(out.astype(np.float32))

    return rotate


@pytest.mark.parametrize(("family", "pairs"), [("gpt2", 0), ("qwen2", 8)])
def test_quantized_joint_latents_are_read_as_if_written_out(tiny, joint, family, pairs):
    t = tiny(family)
    attachment = joint(t, 32, pairs, bits=8, group_size=32)
    got = np.array(t.model(t.tokens, cache=make_prompt_cache(t.model)))
    scored = WithCache(t.model, lambda: [WrittenOutKVCache(8, 32, b) for b in attachment.bases])
    assert relative_difference(got, np.array(scored(t.tokens))) < 1e-4
    assert attachment.bytes_per_token == measured_bytes(
        make_prompt_cache(t.model), t.heads, mx.float32
    )


def test_settings_that_do_not_fit_are_refused(tiny, joint):
    with pytest.raises(MlxSvdError, match="has learned positions; use 0"):
        joint(tiny("gpt2"), 8, 2)
    with pytest.raises(MlxSvdError, match="a head has 8"):
        joint(tiny("qwen2"), 8, 9)
    with pytest.raises(MlxSvdError, match="give 1 to 64"):
        joint(tiny("qwen2"), 65, 0)
    with pytest.raises(MlxSvdError, match="no multiples of the group size 64"):
        joint(tiny("qwen2"), 8, 0, bits=8)
