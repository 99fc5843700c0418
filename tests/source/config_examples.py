"""One valid config.json of each family, as transformers 5 saves it, small."""

from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
NESTED = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
GEMMA3_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
    }
}
# One valid config of each family, as transformers 5 saves it.
V5: dict[str, dict[str, Any]] = {
    "llama": {**SHAPE, **NESTED},
    "mistral": {**SHAPE, **NESTED, "sliding_window": None},
    "qwen2": {**SHAPE, **NESTED, "use_sliding_window": False, "sliding_window": None},
    "qwen3": {**SHAPE, **NESTED, "use_sliding_window": False, "sliding_window": None},
    "gemma2": {**SHAPE, **NESTED, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3_text": {
        **SHAPE,
        **GEMMA3_ROPE,
        "_sliding_window_pattern": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {
        **SHAPE,
        "rope_parameters": {**NESTED["rope_parameters"], "partial_rotary_factor": 0.5},
    },
    "gpt2": {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {
        **SHAPE,
        "intermediate_size": 256,
        "rope_parameters": {**NESTED["rope_parameters"], "partial_rotary_factor": 0.5},
    },
    "gpt_neo": {
        "vocab_size": 100,
        "hidden_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "max_position_embeddings": 128,
    },
}


def made(family: str, **changes: Any) -> dict[str, Any]:
    """The family's config with some keys changed."""
    return {"model_type": family, **V5[family], **changes}
