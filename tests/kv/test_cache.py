"""Latent caches in stock mlx-lm models: exact at full rank, read at every step, and as small as
predicted."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from mlx_svd.checkpoint.loader import load
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.attach import attach
from mlx_svd.kv.attention import output_projections
from mlx_svd.kv.bases import kv_bases
from mlx_svd.kv.cache import LatentBatchKVCache
from mlx_svd.kv.components import key_components, value_components
from mlx_svd.kv.settings import KVSettings
from mlx_svd.kv.with_cache import WithCache, WrittenOutKVCache, measured_bytes
from tests.conftest import relative_difference
from tests.kv.conftest import FAMILIES
from tests.kv.reference import written_back

HALF = KVSettings(rank=8)


def stepwise(model, tokens, prompt: int) -> np.ndarray:
    """Logits of a prompt and then of one token at a time, through the model's own caches."""
    caches = make_prompt_cache(model)
    parts = [model(tokens[:, :prompt], cache=caches)]
    parts += [model(tokens[:, n : n + 1], cache=caches) for n in range(prompt, tokens.shape[1])]
    return np.array(mx.concatenate(parts, axis=1))


@pytest.fixture
def attached():
    """attach(...), undone after the test."""
    made = []

    def run(t, settings):
        made.append(attach(t.model, t.type, t.bases, settings))
        return made[-1]

    yield run
    for attachment in made:
        attachment.detach()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        KVSettings(),
        KVSettings(keys="pca", values="pca", heads_per_group=2),
        KVSettings(keys="joint", heads_per_group=None),
        KVSettings(fold=True),
    ],
)
def test_full_rank_gives_the_dense_logits(tiny, attached, family, settings):
    t = tiny(family)
    dense = np.array(t.model(t.tokens))
    attached(t, settings)
    assert relative_difference(stepwise(t.model, t.tokens, 30), dense) < 2e-5
    assert relative_difference(np.array(t.model(t.tokens)), dense) < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group", [1, 2, None])
def test_decoding_equals_attention_over_projected_keys_and_values(tiny, attached, family, group):
    """Not the same path: here the projections are multiplied back and read by dense attention."""
    t = tiny(family)
    settings = KVSettings(rank=t.heads[0][1] // 2, heads_per_group=group)
    attachment = attached(t, settings)
    got = stepwise(t.model, t.tokens, 30)
    attachment.detach()
    maps = []
    layers = output_projections(t.model, t.type)
    for moments, ranks, (module, name) in zip(
        t.bases.layers, attachment.ranks, layers, strict=True
    ):
        weight = np.array(getattr(module, name).weight)
        pair = []
        for parts, rank in (
            (key_components(moments, "kq", group), ranks[0]),
            (value_components(moments, "output", group, weight), ranks[1]),
        ):
            n = len(parts.encode) * parts.encode.shape[1]
            matrix = np.zeros((n, n))
            for g, (encode, decode) in enumerate(zip(parts.encode, parts.decode, strict=True)):
                at = slice(g * len(encode), (g + 1) * len(encode))
                matrix[at, at] = encode[:, :rank] @ decode[:rank]
            mean = parts.mean.reshape(-1)
            pair.append((matrix, mean - mean @ matrix))
        maps.append(pair)
    with written_back(t.model, t.type, maps):
        expected = np.array(t.model(t.tokens))
    assert relative_difference(got, expected) < 5e-5
    dense = np.array(t.model(t.tokens))
    assert relative_difference(got, dense) > 1e-3


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("part", ["keys", "values"])
def test_corrupting_a_latent_changes_the_logits(tiny, attached, family, part):
    t = tiny(family)
    attached(t, HALF)
    logits = []
    for corrupt in (False, True):
        caches = make_prompt_cache(t.model)
        mx.eval(t.model(t.tokens[:, :30], cache=caches))
        if corrupt:
            latent = getattr(caches[0], part)
            latent[:, :, 3] = latent[:, :, 3] + 1
        logits.append(np.array(t.model(t.tokens[:, 30:31], cache=caches)))
    assert relative_difference(*logits) > 1e-4


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize(
    ("family", "longer"),
    [("qwen2", {"max_position_embeddings": 512}), ("gpt2", {"n_positions": 512})],
)
def test_a_context_grows_past_its_first_allocation(tiny, attached, family, longer, bits):
    t = (
        tiny(family, **longer, num_attention_heads=2)
        if family == "qwen2"
        else tiny(family, **longer)
    )
    tokens = mx.array(np.random.default_rng(1).integers(0, 90, (1, 300)))
    attached(t, KVSettings(heads_per_group=None, bits=bits, group_size=32))
    whole = np.array(t.model(tokens, cache=make_prompt_cache(t.model)))
    caches = make_prompt_cache(t.model)
    parts = [t.model(tokens[:, :250], cache=caches)]
    first = caches[0].nbytes
    parts += [t.model(tokens[:, n : n + 1], cache=caches) for n in range(250, 300)]
    assert caches[0].offset == 300
    assert caches[0].nbytes > first
    assert relative_difference(np.array(mx.concatenate(parts, axis=1)), whole) < 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo"])
@pytest.mark.parametrize("fold", [False, True])
def test_folding_the_values_into_the_weights_changes_nothing(tiny, attached, family, fold):
    t = tiny(family)
    weights = dict(mx_flat(t.model))
    attachment = attached(t, KVSettings(rank=10, fold=fold))
    assert (attachment.bases[0].expand is None) == fold
    got = stepwise(t.model, t.tokens, 30)
    attachment.detach()
    assert {k: v.shape for k, v in mx_flat(t.model)} == {k: v.shape for k, v in weights.items()}
    attachment = attach(t.model, t.type, t.bases, KVSettings(rank=10))
    expected = stepwise(t.model, t.tokens, 30)
    attachment.detach()
    assert relative_difference(got, expected) < 2e-5


def mx_flat(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def test_sequences_of_a_batch_do_not_meet(tiny, attached):
    t = tiny("qwen2")
    attached(t, HALF)
    together = stepwise(t.model, t.tokens, 30)
    for row in range(2):
        alone = stepwise(t.model, t.tokens[row : row + 1], 30)
        assert relative_difference(together[row : row + 1], alone) < 2e-5


def test_sequences_of_different_lengths_are_merged_into_a_batch(tiny, attached):
    """As mlx-lm's BatchGenerator does: merge, decode, extract."""
    t = tiny("qwen2")
    attached(t, HALF)
    lengths, expected, singles = (20, 30), [], []
    for row, length in enumerate(lengths):
        caches = make_prompt_cache(t.model)
        mx.eval(t.model(t.tokens[row : row + 1, :length], cache=caches))
        singles.append(copy.deepcopy(caches))
        expected.append(
            np.array(t.model(t.tokens[row : row + 1, length : length + 1], cache=caches))
        )
    batch = [layer[0].merge(layer) for layer in zip(*singles, strict=True)]
    assert all(type(cache) is LatentBatchKVCache for cache in batch)
    following = mx.stack([t.tokens[row, n : n + 1] for row, n in enumerate(lengths)])
    got = np.array(t.model(following, cache=batch))
    assert relative_difference(got, np.concatenate(expected)) < 2e-5
    alone = [cache.extract(0) for cache in batch]
    assert alone[0].offset == lengths[0] + 1
    mx.eval(t.model(t.tokens[:1, 22:23], cache=alone))
    empty = [layer[0].merge(layer) for layer in [make_prompt_cache(t.model) for _ in range(2)]]
    assert type(empty[0]) is LatentBatchKVCache


def test_a_trimmed_cache_continues_as_if_the_rest_had_never_been(tiny, attached):
    t = tiny("gpt_neo")
    attached(t, HALF)
    caches = make_prompt_cache(t.model)
    mx.eval(t.model(t.tokens, cache=caches))
    assert caches[0].trim(10) == 10 == caches[1].trim(10)
    got = np.array(t.model(t.tokens[:, 30:], cache=caches))
    assert relative_difference(got, stepwise(t.model, t.tokens, 30)[:, 30:]) < 2e-5


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["qwen2", "gpt_neo"])
def test_quantized_latents_are_read_as_if_written_out(tiny, attached, family, bits):
    t = tiny(family)
    settings = KVSettings(heads_per_group=None, bits=bits, group_size=32)
    attachment = attached(t, settings)
    got = np.array(t.model(t.tokens, cache=make_prompt_cache(t.model)))
    scored = WithCache(
        t.model, lambda: [WrittenOutKVCache(bits, 32, basis) for basis in attachment.bases]
    )
    assert relative_difference(got, np.array(scored(t.tokens))) < 1e-4
    exact = np.array(t.model(t.tokens))
    assert 1e-4 < relative_difference(got, exact) < (0.5 if bits == 4 else 0.05)


def test_mlx_lms_quantized_cache_is_scored_as_if_written_out(tiny):
    t = tiny("llama", hidden_size=128, num_key_value_heads=2)
    n = len(t.model.layers)
    got = np.array(t.model(t.tokens, cache=[QuantizedKVCache(32, 4) for _ in range(n)]))
    scored = WithCache(t.model, lambda: [WrittenOutKVCache(4, 32) for _ in range(n)])
    assert relative_difference(got, np.array(scored(t.tokens))) < 1e-4


def test_mlx_lms_kv_bits_quantizes_latents_on_the_way(tiny, attached):
    t = tiny("qwen2")
    attached(t, KVSettings(heads_per_group=None))
    caches = make_prompt_cache(t.model)
    mx.eval(t.model(t.tokens[:, :30], cache=caches))
    before = copy.deepcopy(caches)
    quantized = [cache.to_quantized(32, 8) for cache in caches]
    got = np.array(t.model(t.tokens[:, 30:], cache=quantized))
    exact = np.array(t.model(t.tokens[:, 30:], cache=before))
    assert relative_difference(got, exact) < 0.05
    with pytest.raises(MlxSvdError, match="no multiple of the group size 64"):
        before[0].to_quantized(64, 8)


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
@pytest.mark.parametrize(
    "settings",
    [
        KVSettings(rank=5),
        KVSettings(energy=0.9),
        KVSettings(heads_per_group=None, rank=16, bits=8, group_size=32),
        KVSettings(heads_per_group=None, bits=4, group_size=32),
    ],
)
def test_measured_bytes_are_the_predicted_ones(tiny, settings, dtype):
    t = tiny("qwen2")
    attachment = attach(t.model, t.type, t.bases, settings, itemsize=dtype.size)
    measured = measured_bytes(make_prompt_cache(t.model), t.heads, dtype)
    attachment.detach()
    assert measured == attachment.bytes_per_token
    dense = measured_bytes([KVCache() for _ in t.heads], t.heads, dtype)
    assert dense == 2 * 2 * 2 * 16 * dtype.size
    assert measured < dense


def test_stock_generation_uses_the_latents_by_itself():
    model, tokenizer = load(DEMO_MODEL, dtype="float32")
    bases = kv_bases(str(DEMO_MODEL), None, windows=2, length=128)
    prompt = tokenizer.encode("The capital of France is")

    def text():
        return "".join(r.text for r in stream_generate(model, tokenizer, prompt, max_tokens=6))

    dense = text()
    attachment = attach(model, "qwen2", bases, KVSettings())
    assert text() == dense
    assert "Paris" in dense
    attachment.detach()
    attachment = attach(model, "qwen2", bases, KVSettings(rank=1))
    assert text() != dense


def test_foreign_caches_and_second_bases_are_refused(tiny, attached):
    t = tiny("qwen2")
    attached(t, HALF)
    with pytest.raises(MlxSvdError, match="was given a KVCache"):
        t.model(t.tokens, cache=[KVCache() for _ in t.heads])
    with pytest.raises(MlxSvdError, match="latents already"):
        attach(t.model, t.type, t.bases, HALF)


def test_what_is_not_supported_is_refused_and_changes_nothing(tiny, attached):
    sliding = tiny("gemma3_text")
    with pytest.raises(MlxSvdError, match="sliding windows"):
        attached(sliding, HALF)
    t = tiny("qwen2")
    dense = np.array(t.model(t.tokens))
    with pytest.raises(MlxSvdError, match="does not divide the 16 numbers"):
        attached(t, KVSettings(bits=8))
    with pytest.raises(MlxSvdError, match="--kv-fold: needs a basis for each head"):
        KVSettings(fold=True, heads_per_group=None)
    np.testing.assert_array_equal(np.array(t.model(t.tokens)), dense)


@pytest.mark.parametrize("name", ["qwen2-6m", "qwen2-16m", "llama-44m", "gpt2-14m", "gpt-neo-8m"])
def test_real_models_decode_through_latents(shared, name):
    folder = shared / "models" / name
    model, tokenizer = load(folder, dtype="float32")
    bases = kv_bases(str(folder), None, windows=12, length=96)
    tokens = mx.array(tokenizer.encode("It was the best of times, it was the worst")[:9])[None]
    dense = np.array(model(tokens))
    attachment = attach(model, bases.info.model_type, bases, KVSettings(fold=True))
    assert relative_difference(stepwise(model, tokens, 6), dense) < 5e-5
    attachment.detach()
    settings = KVSettings(heads_per_group=None, bits=8)
    attachment = attach(model, bases.info.model_type, bases, settings)
    eight = relative_difference(stepwise(model, tokens, 6), dense)
    attachment.detach()
    assert 0 < eight < 0.01  # mlx-lm's own 8 bits: 0.004 to 0.006
