"""Every rotary setting that normalize_config lets through gives transformers' logits."""

import pytest

from mlx_svd.source.source import open_source

pytestmark = pytest.mark.reference

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SETTINGS = {
    "another base": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": _YARN,
    "yarn without the original length": {"rope_type": "yarn", "factor": 4.0},
    "yarn with an attention factor": {**_YARN, "attention_factor": 1.5},
    "yarn with both mscales": {
        **_YARN,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "beta_fast": 16,
        "beta_slow": 2,
    },
}
_SHORT = [1.0, 1.1, 1.3, 1.7, 2.0, 3.0, 4.0, 5.0]
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": _SHORT,
    "original_max_position_embeddings": 100,
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_rope_type_gives_transformers_logits(family, settings, tiny, tokens, difference):
    made = tiny(family, rope_parameters={**settings, "rope_theta": 500.0})
    assert difference(*made, tokens) < 1e-4


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_dynamic_rope_gives_transformers_logits_past_the_trained_length(
    family, tiny, tokens, difference
):
    settings = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}
    made = tiny(family, rope_parameters=settings, max_position_embeddings=32)
    assert difference(*made, tokens) < 1e-4


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_longrope_with_equal_factors_gives_transformers_logits(family, tiny, tokens, difference):
    made = tiny(
        family,
        max_position_embeddings=200,
        rope_parameters={**_LONGROPE, "long_factor": _SHORT},
        **({"original_max_position_embeddings": 100} if family == "phi3" else {}),
    )
    assert difference(*made, tokens) < 1e-4


def test_longrope_is_stock_mlx_lms_long_factor_at_every_length(tiny, tokens, difference):
    model, folder = tiny(
        "phi3",
        max_position_embeddings=200,
        original_max_position_embeddings=100,
        rope_parameters={**_LONGROPE, "long_factor": [8.0 * f for f in _SHORT]},
    )
    assert difference(model, folder, tokens) > 1e-3
    assert any("longrope" in text for text in open_source(str(folder)).warnings)


def test_gemma3_scales_full_layers_and_keeps_the_local_base(tiny, tokens, difference):
    made = tiny(
        "gemma3_text",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    )
    assert difference(*made, tokens) < 1e-4
