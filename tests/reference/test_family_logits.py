"""The MLX model of each family computes what transformers computes, config as saved by it."""

import pytest

pytestmark = pytest.mark.reference

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "gpt_neo",
)
VARIANTS = {
    "llama with biases, tied, own head size": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "head_dim": 20,
        },
    ),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2 whose windows are switched off": ("qwen2", {"sliding_window": 8}),
    "mistral with a window no sequence reaches": ("mistral", {"sliding_window": 128}),
    "gemma3 untied": ("gemma3_text", {"tie_word_embeddings": False}),
    "gemma3 whose attention soft cap transformers ignores": (
        "gemma3_text",
        {"attn_logit_softcapping": 5.0},
    ),
    "gpt2 that reorders the scaling": ("gpt2", {"reorder_and_upcast_attn": True}),
    "gpt_neox with sequential residuals": (
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "rope_parameters": {
                "rope_type": "default",
                "partial_rotary_factor": 0.5,
                "rope_theta": 500.0,
            },
        },
    ),
    "gpt_neo untied": ("gpt_neo", {"tie_word_embeddings": False}),
    "gpt_neo all local, exact gelu": (
        "gpt_neo",
        {"attention_types": [[["local"], 4]], "activation_function": "gelu"},
    ),
    "gpt_neo all global, wide": (
        "gpt_neo",
        {"attention_types": [[["global"], 4]], "intermediate_size": 96},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tiny, tokens, difference):
    assert difference(*tiny(family), tokens) < 1e-4


@pytest.mark.parametrize(("family", "overrides"), VARIANTS.values(), ids=VARIANTS)
def test_logits_of_a_variant_equal_transformers(family, overrides, tiny, tokens, difference):
    assert difference(*tiny(family, **overrides), tokens) < 1e-4


def test_exact_gelu_of_gpt_neox_stays_within_a_thousandth(tiny, tokens, difference):
    value = difference(*tiny("gpt_neox", hidden_act="gelu"), tokens)
    assert 1e-5 < value < 1e-3


def test_gemma3_differs_only_by_mlx_lms_rounded_embedding_scale(tiny, tokens, difference):
    model, folder = tiny("gemma3_text", hidden_size=96)  # sqrt(96) is not a bfloat16 number
    assert 1e-4 < difference(model, folder, tokens) < 1e-2
    scale = model.model.embed_tokens.embed_scale
    scale.copy_(scale.bfloat16().float())
    assert difference(model, folder, tokens) < 1e-4
