"""What normalize_config refuses really is another model, and its defaults are transformers'."""

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.source.config_tables import DEFAULTS
from mlx_svd.source.source import open_source

pytestmark = pytest.mark.reference

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


# family, what to build, what mlx-lm would see, having ignored the setting
REFUSED = {
    "gemma3's final soft cap": (
        "gemma3_text",
        {"final_logit_softcapping": 30.0},
        lambda config: config.update(final_logit_softcapping=None),
    ),
    "gpt2's layer scaling": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        lambda config: config.update(scale_attn_by_inverse_layer_idx=False),
    ),
    "gpt2's missing scale": (
        "gpt2",
        {"scale_attn_weights": False},
        lambda config: config.update(scale_attn_weights=True),
    ),
    "llama's activation": (
        "llama",
        {"hidden_act": "gelu"},
        lambda config: config.update(hidden_act="silu"),
    ),
    "gpt_neox's activation": (
        "gpt_neox",
        {"hidden_act": "relu"},
        lambda config: config.update(hidden_act="gelu"),
    ),
    "yarn without rounding": (
        "llama",
        {"rope_parameters": {**_YARN, "rope_theta": 500.0, "truncate": False}},
        lambda config: config["rope_parameters"].pop("truncate"),
    ),
    "neox with scaled rope": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        lambda config: config["rope_parameters"].update(rope_type="default"),
    ),
}


@pytest.mark.parametrize(("family", "overrides", "ignore"), REFUSED.values(), ids=REFUSED)
def test_refused_setting_would_have_changed_the_logits(
    family, overrides, ignore, tiny, tokens, difference, edit_config
):
    model, folder = tiny(family, **overrides)
    with pytest.raises(MlxSvdError):
        difference(model, folder, tokens)
    edit_config(folder, ignore)
    assert difference(model, folder, tokens) > 1e-3


# Settings that mlx-lm's model ignores in texts longer than the window.
_LATE = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
WINDOWS = {
    "mistral": {"sliding_window": 16},
    "phi3": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16},
    "qwen2": _LATE,
    "qwen3": _LATE,
}


@pytest.mark.parametrize(("family", "overrides"), WINDOWS.items(), ids=WINDOWS)
def test_ignored_window_is_exact_up_to_the_window_and_wrong_beyond(
    family, overrides, tiny, tokens, difference
):
    model, folder = tiny(family, **overrides)
    assert difference(model, folder, tokens[:16]) < 1e-4
    assert difference(model, folder, tokens) > 1e-3
    assert any("sliding_window=16" in text for text in open_source(str(folder)).warnings)


@pytest.mark.parametrize("family", DEFAULTS)
def test_defaults_are_those_of_transformers_classes(family):
    import transformers

    config = transformers.AutoConfig.for_model(family)
    assert {key: getattr(config, key) for key in DEFAULTS[family]} == DEFAULTS[family]
