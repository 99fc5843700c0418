"""GPT-Neo for MLX: against a plain numpy forward, with caches, in batches, and inside mlx-lm."""

import json
import math
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from mlx_svd.models import modeling_gpt_neo
from mlx_svd.models.modeling_gpt_neo import Model, ModelArgs

WINDOW = 8
LENGTH = 40
CONFIG = {
    "model_type": "gpt_neo",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "max_position_embeddings": 64,
    "window_size": WINDOW,
    "attention_types": [[["global", "local"], 2]],
}


def build(**overrides) -> Model:
    """A float32 model in which every parameter matters (no zero bias, no unit norm)."""
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict({**CONFIG, **overrides}))

    def value(path: str, parameter: mx.array) -> mx.array:
        noise = mx.random.normal(parameter.shape)
        if parameter.ndim > 1:
            return noise / math.sqrt(parameter.shape[-1])
        return 0.2 * noise + (1.0 if path.endswith("weight") else 0.0)

    model.update(tree_map_with_path(value, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module")
def model() -> Model:
    return build()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, CONFIG["vocab_size"], LENGTH)


def logits(model: Model, tokens, cache=None) -> np.ndarray:
    return np.array(model(mx.array(tokens)[None], cache=cache)[0])


def numpy_logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    """The same network from its definition, in float64, one head and one query at a time."""
    w = {k: np.array(v, dtype=np.float64) for k, v in tree_flatten(model.parameters())}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + model.args.layer_norm_epsilon)
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attend(q, k, v, local):
        out = np.zeros_like(q)
        for i in range(len(q)):
            first = max(0, i - model.args.window_size + 1) if local else 0
            scores = np.exp(k[first : i + 1] @ q[i])
            out[i] = scores @ v[first : i + 1] / scores.sum()
        return out

    x = w["model.wte.weight"][tokens] + w["model.wpe.weight"][: len(tokens)]
    for i, kind in enumerate(model.args.attention_layers):
        h = f"model.h.{i}"
        a = f"{h}.attn.attention"
        y = norm(x, f"{h}.ln_1")
        q, k, v = (
            np.split(y @ w[f"{a}.{p}_proj.weight"].T, model.args.num_heads, axis=-1) for p in "qkv"
        )
        heads = [attend(*parts, kind == "local") for parts in zip(q, k, v, strict=True)]
        out = np.concatenate(heads, axis=-1)
        x = x + out @ w[f"{a}.out_proj.weight"].T + w[f"{a}.out_proj.bias"]
        y = norm(x, f"{h}.ln_2") @ w[f"{h}.mlp.c_fc.weight"].T + w[f"{h}.mlp.c_fc.bias"]
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + y @ w[f"{h}.mlp.c_proj.weight"].T + w[f"{h}.mlp.c_proj.bias"]
    return norm(x, "model.ln_f") @ w["model.wte.weight"].T


def test_logits_equal_a_plain_numpy_forward(model, tokens):
    np.testing.assert_allclose(logits(model, tokens), numpy_logits(model, tokens), atol=1e-4)


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [20, *[1] * 20], [3, 17, 1, 19], [LENGTH]])
def test_cached_decode_equals_the_full_forward_beyond_the_window(model, tokens, chunks):
    cache, start, parts = make_prompt_cache(model), 0, []
    for size in chunks:
        parts.append(logits(model, tokens[start : start + size], cache))
        start += size
    np.testing.assert_allclose(np.concatenate(parts), logits(model, tokens), atol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_a_local_layer_sees_exactly_its_window(tokens, cached):
    model = build(num_layers=1, attention_types=[[["local"], 1]])

    def last(ids):
        if not cached:
            return logits(model, ids)[-1]
        cache = make_prompt_cache(model)
        logits(model, ids[:-1], cache)
        return logits(model, ids[-1:], cache)[-1]

    before = last(tokens)
    for distance in range(1, LENGTH):
        changed = tokens.copy()
        changed[-1 - distance] = (changed[-1 - distance] + 1) % CONFIG["vocab_size"]
        moved = np.abs(last(changed) - before).max()
        assert (moved > 1e-4) == (distance < WINDOW), distance


def test_a_global_layer_sees_everything(tokens):
    model = build(num_layers=1, attention_types=[[["global"], 1]])
    changed = tokens.copy()
    changed[0] = (changed[0] + 1) % CONFIG["vocab_size"]
    assert np.abs(logits(model, changed)[-1] - logits(model, tokens)[-1]).max() > 1e-4


def test_batched_generation_with_padding_equals_single_generation(model, tokens):
    prompts = [tokens[:30].tolist(), tokens[5:9].tolist(), tokens[10:27].tolist()]
    steps = 12
    single = [
        [
            (token, np.array(row))
            for token, row in generate_step(mx.array(p), model, max_tokens=steps)
        ]
        for p in prompts
    ]
    generator = BatchGenerator(model, max_tokens=steps, prefill_step_size=10)
    batch = {uid: [] for uid in generator.insert(prompts)}
    while responses := generator.next_generated():
        for response in responses:
            batch[response.uid].append((response.token, np.array(response.logprobs)))
    for expected, got in zip(single, batch.values(), strict=True):
        assert [token for token, _ in got] == [int(token) for token, _ in expected]
        for (_, a), (_, b) in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)


def test_a_prompts_padding_may_reach_past_the_position_table(model, tokens):
    """A long cached prefix next to a longer new prompt: 50 + 30 places, 50 + 3 of them real."""
    prefix, new, other = tokens.repeat(2)[:50], tokens[:3], tokens[5:35]
    cache = make_prompt_cache(model)
    logits(model, prefix, cache)
    prompt = np.concatenate([prefix, new])
    expected = [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=4)]
    generator = BatchGenerator(model, max_tokens=4)
    prompts = [new.tolist(), other.tolist()]
    first, _ = generator.insert(prompts, caches=[cache, make_prompt_cache(model)])
    got = []
    while responses := generator.next_generated():
        got += [response.token for response in responses if response.uid == first]
    assert got == expected


class RoundedCache(KVCache):
    """A plain cache of keys and values that went through 8-bit quantization first."""

    def update_and_fetch(self, keys, values):
        rounded = (mx.dequantize(*mx.quantize(x, bits=8), bits=8) for x in (keys, values))
        return super().update_and_fetch(*rounded)


def test_quantized_cache_loses_nothing_but_the_rounding_of_keys_and_values(tokens):
    model = build(num_heads=1)  # head size 64: one quantization group
    quantized = [c.to_quantized(bits=8) for c in make_prompt_cache(model)]
    rounded = [RoundedCache() for _ in model.layers]
    for start, end in [(0, 30), *((i, i + 1) for i in range(30, LENGTH))]:
        expected = logits(model, tokens[start:end], rounded)
        np.testing.assert_allclose(logits(model, tokens[start:end], quantized), expected, atol=1e-3)


def test_half_precision_scores_do_not_overflow(tokens):
    model = build()
    for block in model.layers:
        attention = block.attn.attention
        attention.q_proj.weight = attention.q_proj.weight * 200
        attention.k_proj.weight = attention.k_proj.weight * 200
    model.set_dtype(mx.float16)
    assert np.isfinite(logits(model, tokens)).all()


def test_positions_past_the_table_are_an_error_not_a_wild_read(model):
    cache = make_prompt_cache(model)
    logits(model, np.zeros(64, dtype=int), cache)
    with pytest.raises(ValueError, match="65 tokens, but the model has 64"):
        model(mx.array([[0]]), cache=cache)
    batched = [type(c).merge([c, c]) for c in cache]
    with pytest.raises(ValueError, match="65 tokens"):
        model(mx.array([[0], [0]]), cache=batched)


def test_sanitize_renames_hugging_face_names_and_is_idempotent(model):
    canonical = dict(tree_flatten(model.parameters()))
    raw = {"transformer." + k.removeprefix("model."): v for k, v in canonical.items()}
    raw["lm_head.weight"] = raw["transformer.wte.weight"]
    for i in range(CONFIG["num_layers"]):
        raw[f"transformer.h.{i}.attn.attention.bias"] = mx.zeros((1, 1, 2, 2))
        raw[f"transformer.h.{i}.attn.attention.masked_bias"] = mx.array(-1e9)
    once = model.sanitize(raw)
    assert set(once) == set(canonical)
    assert set(model.sanitize(once)) == set(canonical)


def test_untied_head_is_its_own_parameter(tokens):
    model = build(tie_word_embeddings=False)
    names = dict(tree_flatten(model.parameters()))
    assert "lm_head.weight" in model.sanitize(names)
    expected = np.array(model.model(mx.array(tokens)[None])[0] @ names["lm_head.weight"].T)
    np.testing.assert_allclose(logits(model, tokens), expected, atol=1e-5)


def test_quantizing_and_lora_wrap_the_projections(tokens):
    model = build()
    before = logits(model, tokens)
    nn.quantize(model, group_size=32, bits=8)
    assert isinstance(model.layers[1].attn.attention.q_proj, nn.QuantizedLinear)
    quantized = logits(model, tokens)
    assert np.abs(quantized - before).max() < 0.05 * np.abs(before).max()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    adapters = [k for k, _ in tree_flatten(model.parameters()) if k.endswith("lora_a")]
    assert len(adapters) == 2 * 6
    np.testing.assert_allclose(logits(model, tokens), quantized, atol=1e-4)


def test_loads_through_mlx_lms_model_file(model, tokens, tmp_path: Path):
    shutil.copy(modeling_gpt_neo.__file__, tmp_path / "modeling_gpt_neo.py")
    config = {**CONFIG, "model_file": "modeling_gpt_neo.py"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    loaded, _ = load_model(tmp_path, trust_remote_code=True)
    assert type(loaded) is not Model
    np.testing.assert_array_equal(logits(loaded, tokens), logits(model, tokens))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention_types": [[["global"], 3]]}, "3 attention layers for num_layers=4"),
        ({"attention_types": [[["global", "sparse"], 2]]}, "unknown attention layer types"),
        ({"attention_layers": ["local"] * 4}, "contradicts"),
        ({"num_heads": 5}, "not a multiple"),
        ({"activation_function": "tanh"}, "unsupported activation_function 'tanh'"),
    ],
)
def test_settings_it_does_not_implement_are_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        ModelArgs.from_dict({**CONFIG, **overrides})


def test_layers_come_from_the_list_where_there_are_no_types():
    args = ModelArgs.from_dict(
        {**CONFIG, "attention_types": None, "attention_layers": ["local", "global"] * 2}
    )
    assert args.attention_layers == ["local", "global", "local", "global"]
    assert args.intermediate_size == 4 * CONFIG["hidden_size"]
