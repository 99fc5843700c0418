"""What config.json means where it is silent, and which of its settings mlx-lm has hard-wired.

Per family (`model_type`); compared: transformers 5.23, mlx-lm 0.32.2. The reference tests check
`DEFAULTS` against transformers' classes.
"""

from typing import Any

_SILU = ("silu", "swish")
_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_OFF = (False, None)
_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_GATED_SHAPE = (*_SHAPE, "intermediate_size")

REQUIRED = {
    "llama": _GATED_SHAPE,
    "mistral": _GATED_SHAPE,
    "qwen2": _GATED_SHAPE,
    "qwen3": _GATED_SHAPE,
    "gemma2": _GATED_SHAPE,
    "gemma3_text": _GATED_SHAPE,
    "phi3": _GATED_SHAPE,
    "gpt2": ("vocab_size", "n_embd", "n_layer", "n_head"),
    "gpt_neox": _SHAPE,
    "gpt_neo": ("vocab_size", "hidden_size", "num_layers", "num_heads"),
}

# transformers' class defaults of what changes the computation.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "qwen3": {
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "gemma2": {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    "phi3": {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "layer_norm_epsilon": 1e-5,
        "n_positions": 1024,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
    },
    "gpt_neo": {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "window_size": 256,
    },
}

# The only values that mlx-lm's model computes; it never looks at the key.
_GEMMA_FIXED = {
    "hidden_activation": _GELU_TANH,
    "attention_bias": _OFF,
    "use_bidirectional_attention": _OFF,
}
FIXED: dict[str, dict[str, tuple]] = {
    "llama": {"hidden_act": _SILU},
    "mistral": {"hidden_act": _SILU},
    "qwen2": {"hidden_act": _SILU},
    "qwen3": {"hidden_act": _SILU, "attention_bias": _OFF},
    "gemma2": {**_GEMMA_FIXED, "tie_word_embeddings": (True,)},
    "gemma3_text": {**_GEMMA_FIXED, "final_logit_softcapping": (None,)},
    "phi3": {"hidden_act": _SILU},
    # Exact GELU: mlx-lm's tanh form moves the logits by less than 1e-3 (measured: 2e-4).
    "gpt2": {
        "activation_function": ("gelu", *_GELU_TANH),
        "add_cross_attention": _OFF,
        "scale_attn_by_inverse_layer_idx": _OFF,
        "scale_attn_weights": (True,),
        "tie_word_embeddings": (True,),
    },
    "gpt_neox": {
        "hidden_act": ("gelu", *_GELU_TANH),
        "attention_bias": (True,),
        "tie_word_embeddings": _OFF,
    },
    "gpt_neo": {},
}
