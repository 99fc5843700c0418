"""Rotary settings: from where transformers 4 and 5 write them to where mlx-lm reads them."""

import math

import pytest
from config_examples import GEMMA3_ROPE, NESTED, made

from mlx_svd.errors import MlxSvdError
from mlx_svd.source.config import normalize_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}

# family, changes to V5, what must be in the result
ADDED = {
    "rope_theta leaves rope_parameters": ("llama", {}, {"rope_theta": 500.0}),
    "no rope at all means transformers' base": (
        "qwen2",
        {"rope_parameters": None},
        {"rope_theta": 10000.0},
    ),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "llama3": (
        "llama",
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    ),
    "llama3's original length": (
        "llama",
        {
            "rope_parameters": {
                k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"
            }
        },
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 128}},
    ),
    "yarn's defaults": (
        "qwen3",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": None}},
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 2.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "transformers 4's type key stays the one mlx-lm reads first": (
        "llama",
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
    ),
    "the same value in two places": (
        "llama",
        {"rope_theta": 500},
        {"rope_theta": 500.0},
    ),
    "equal settings for all layer types": (
        "gemma2",
        {
            "rope_parameters": {
                "full_attention": NESTED["rope_parameters"],
                "sliding_attention": NESTED["rope_parameters"],
            }
        },
        {"rope_theta": 500.0},
    ),
    "phi3's share": ("phi3", {}, {"rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    "phi3's type key": (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", **LONG}, "max_position_embeddings": 8192},
        {
            "original_max_position_embeddings": 4096,
            "rope_scaling": {
                "type": "longrope",
                "rope_type": "longrope",
                **LONG,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "phi3's first name of longrope": (
        "phi3",
        {"rope_parameters": None, "rope_scaling": {"type": "su", **LONG}},
        {
            "rope_scaling": {
                "type": "longrope",
                "rope_type": "longrope",
                **LONG,
                "original_max_position_embeddings": 4096,
            }
        },
    ),
    "gemma3's two bases": (
        "gemma3_text",
        {},
        {
            "rope_theta": 2e6,
            "rope_local_base_freq": 3e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 2,
        },
    ),
    "gemma3 of transformers 4": (
        "gemma3_text",
        {
            "rope_parameters": None,
            "layer_types": None,
            "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 3,
        },
    ),
    "gpt_neox's own names": ("gpt_neox", {}, {"rotary_emb_base": 500.0, "rotary_pct": 0.5}),
    "gpt_neox's share by default": (
        "gpt_neox",
        {"rope_parameters": None},
        {"rotary_emb_base": 10000.0, "rotary_pct": 0.25},
    ),
}


@pytest.mark.parametrize(("family", "changes", "expected"), ADDED.values(), ids=ADDED)
def test_settings_arrive_where_mlx_lm_reads_them(family, changes, expected):
    given = {k: v for k, v in made(family, **changes).items() if v is not None or k in expected}
    result = normalize_config(given)
    assert {key: result[key] for key in expected} == expected
    assert normalize_config(result) == result


def test_default_rope_adds_no_scaling():
    assert normalize_config(made("llama")).get("rope_scaling") is None


def test_yarns_attention_factor_becomes_the_mscale_that_mlx_lm_reads():
    rope = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}
    scaling = normalize_config(made("llama", rope_parameters=rope))["rope_scaling"]
    assert 0.1 * scaling["mscale"] * math.log(4.0) + 1.0 == pytest.approx(1.5)
    assert scaling["attention_factor"] == 1.5


# family, changes to V5, words that the message must contain
REFUSED = {
    "two bases": ("llama", {"rope_theta": 600.0}, "rope_theta is 500.0 in .*600.0 in"),
    "two scalings": (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "rope_type is 'default' in rope_parameters but 'linear' in rope_scaling",
    ),
    "two names, two types": (
        "llama",
        {"rope_parameters": {"type": "linear", "rope_type": "yarn"}},
        "type and rope_type in rope_parameters differ",
    ),
    "type mlx-lm lacks": ("llama", {"rope_parameters": {"rope_type": "axial"}}, "'axial'.*llama3"),
    "scaling gemma2 ignores": (
        "gemma2",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "rope_type='linear'.*gemma2",
    ),
    "scaling gpt_neox ignores": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "rope_type='linear'.*gpt_neox",
    ),
    "linear phi3": (
        "phi3",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "rope_type='linear'.*phi3",
    ),
    "no factor": ("llama", {"rope_parameters": {"rope_type": "linear"}}, "needs factor"),
    "longrope's factor": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                **LONG,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "attention factor",
    ),
    "yarn without rounding": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
        "truncate=false",
    ),
    "yarn with one mscale": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.5}},
        "mscale=1.5.*remove",
    ),
    "two original lengths": (
        "llama",
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 32},
        "original_max_position_embeddings is 32",
    ),
    "part of a head": (
        "qwen3",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5",
    ),
    "layers that differ": (
        "gemma2",
        {"rope_parameters": GEMMA3_ROPE["rope_parameters"]},
        "differs between layer types",
    ),
    "flat gemma3": ("gemma3_text", NESTED, "nested by layer type"),
    "gemma3's scaled local layers": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "rope_type='linear'",
    ),
    "gpt_neox's two bases": ("gpt_neox", {"rotary_emb_base": 10000}, "rope_theta is 500.0"),
}


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_mlx_lm_would_read_differently_are_refused(family, changes, message):
    with pytest.raises(MlxSvdError, match=message) as error:
        normalize_config(made(family, **changes))
    assert "\n" not in str(error.value)


def test_longrope_with_two_factors_is_accepted_with_a_warning():
    rope = {"rope_type": "longrope", **LONG, "long_factor": [2.0] * 8}
    warnings = []
    config = normalize_config(made("phi3", rope_parameters=rope), warnings.append)
    assert config["rope_scaling"]["long_factor"] == [2.0] * 8
    assert "short_factor up to 4096 tokens" in warnings[0]
