"""normalize_config: what it adds, what it keeps, and what it refuses, by family."""

import copy
import re

import pytest
from config_examples import V5, made
from mlx_lm.utils import _get_classes

from mlx_svd.errors import MlxSvdError
from mlx_svd.models import modeling_gpt_neo
from mlx_svd.source.config import normalize_config

SLIDING = {"use_sliding_window": True, "sliding_window": 16}


@pytest.mark.parametrize("family", V5)
def test_mlx_can_build_every_family_as_transformers_5_saves_it(family):
    config = normalize_config(made(family))
    if family == "gpt_neo":
        model_class, args_class = modeling_gpt_neo.Model, modeling_gpt_neo.ModelArgs
    else:
        model_class, args_class = _get_classes(config)
    assert len(model_class(args_class.from_dict(config)).layers) in (2, 4)


@pytest.mark.parametrize("family", V5)
def test_result_is_a_superset_and_normalizing_again_changes_nothing(family):
    config = made(family, dtype="bfloat16", something_unknown={"kept": [1]})
    given = copy.deepcopy(config)
    result = normalize_config(config)
    assert config == given
    assert {key: result[key] for key in given} == given
    assert normalize_config(result) == result
    result["something_unknown"]["kept"].append(2)
    assert config == given


# family, changes to V5, what must be in the result
ADDED = {
    "untied by default, unlike in mlx-lm": ("llama", {}, {"tie_word_embeddings": False}),
    "gemma2's attention scale, unlike in mlx-lm": ("gemma2", {}, {"query_pre_attn_scalar": 256}),
    "gemma3 all global": (
        "gemma3_text",
        {"layer_types": ["full_attention"] * 4},
        {"sliding_window_pattern": 1},
    ),
    "gpt2's n_ctx": ("gpt2", {}, {"n_ctx": 128}),
    "gpt2 with explicit defaults": (
        "gpt2",
        {"n_inner": 256, "n_ctx": 64, "activation_function": "gelu_pytorch_tanh"},
        {"n_ctx": 64},
    ),
    "gpt_neo's layers": (
        "gpt_neo",
        {},
        {"attention_layers": ["global", "local", "global", "local"], "window_size": 256},
    ),
    "qwen3's head size": ("qwen3", {}, {"head_dim": 128}),
    "null head size": ("llama", {"head_dim": None}, {"head_dim": 16}),
    "null key heads": ("qwen2", {"num_key_value_heads": None}, {"num_key_value_heads": 4}),
    "a window as long as the model": ("mistral", {"sliding_window": 128}, {"sliding_window": 128}),
    "windows in layers the model does not have": ("qwen2", {**SLIDING, "max_window_layers": 4}, {}),
}


@pytest.mark.parametrize(("family", "changes", "expected"), ADDED.values(), ids=ADDED)
def test_what_mlx_lm_needs_is_added(family, changes, expected):
    given = {k: v for k, v in made(family, **changes).items() if v is not None or k in expected}
    result = normalize_config(given)
    assert {key: result[key] for key in expected} == expected
    assert normalize_config(result) == result


# family, changes to V5, words that the message must contain
REFUSED = {
    "unknown family": ("llama", {"model_type": "mamba"}, "mamba.*supported: llama"),
    "missing shape": ("llama", {"hidden_size": None}, "hidden_size is missing"),
    "gemma3's irregular layers": (
        "gemma3_text",
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "layer_types=.*full_attention layer after every",
    ),
    "gemma3 all local": (
        "gemma3_text",
        {"layer_types": ["sliding_attention"] * 4},
        "layer_types=",
    ),
    "gemma3's two patterns": (
        "gemma3_text",
        {"sliding_window_pattern": 6},
        "sliding_window_pattern is 6 but layer_types repeats every 2",
    ),
    "gemma3's final cap": ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softc"),
    "gemma2 without a cap": ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
    "gemma2 untied": ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    "gemma2's activation": ("gemma2", {"hidden_activation": "relu"}, "hidden_activation='relu'"),
    "gemma both ways": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention=True",
    ),
    "llama's activation": ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
    "llama's layer types": (
        "llama",
        {"layer_types": ["sliding_attention", "full_attention"] * 2},
        "layer_types.*remove",
    ),
    "qwen3's biases": ("qwen3", {"attention_bias": True}, "attention_bias=True"),
    "qwen2's own head size": ("qwen2", {"head_dim": 32}, "head_dim=32"),
    "gpt2's layer scaling": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx=True",
    ),
    "gpt2 without scaling": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    "gpt2's width": ("gpt2", {"n_inner": 100}, "n_inner=100.*null or 256"),
    "gpt2's activation": ("gpt2", {"activation_function": "relu"}, "activation_function='relu'"),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    "gpt_neox's width": ("gpt_neox", {"intermediate_size": 100}, "intermediate_size=100"),
    "gpt_neox without biases": ("gpt_neox", {"attention_bias": False}, "attention_bias=False"),
    "gpt_neox's activation": ("gpt_neox", {"hidden_act": "relu"}, "hidden_act='relu'"),
    "gpt_neox tied": ("gpt_neox", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    "gpt_neo's layer count": ("gpt_neo", {"num_layers": 6}, "4 attention layers for num_layers=6"),
}


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_mlx_lm_would_compute_differently_is_refused(family, changes, message):
    with pytest.raises(MlxSvdError, match=message) as error:
        normalize_config(made(family, **changes))
    assert "\n" not in str(error.value)


# Right up to some length of text, and used that way by everyone who runs these models in mlx-lm.
WARNED = {
    "mistral's window": (
        "mistral",
        {"sliding_window": 32},
        "sliding_window=32.*texts longer than 32 tokens",
    ),
    "phi3's window": ("phi3", {"sliding_window": 32}, "sliding_window=32"),
    "gemma2's window": ("gemma2", {"sliding_window": 32}, "sliding_window=32"),
    "qwen2's window": ("qwen2", {**SLIDING, "max_window_layers": 2}, "sliding_window=16"),
    "qwen3's layers with a window": (
        "qwen3",
        {**SLIDING, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
        "sliding_window=16",
    ),
}


@pytest.mark.parametrize(("family", "changes", "message"), WARNED.values(), ids=WARNED)
def test_what_differs_in_long_texts_only_is_accepted_with_a_warning(family, changes, message):
    warnings = []
    config = normalize_config(made(family, **changes), warnings.append)
    assert config["sliding_window"] == changes["sliding_window"]
    assert len(warnings) == 1
    assert re.search(message, warnings[0])


def test_window_as_long_as_the_model_warns_of_nothing():
    warnings = []
    normalize_config(made("mistral", sliding_window=128), warnings.append)
    assert warnings == []


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_exact_gelu_is_accepted_because_the_tanh_form_differs_by_less_than_1e_3(family):
    key = "activation_function" if family == "gpt2" else "hidden_act"
    assert normalize_config(made(family, **{key: "gelu"}))[key] == "gelu"
