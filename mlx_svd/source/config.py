"""config.json of a Hugging Face model -> a config that stock mlx-lm builds the same model from.

mlx-lm and transformers fill gaps with different defaults, and mlx-lm ignores keys it does not
know. So every gap is filled with transformers' default, and a setting that mlx-lm would ignore is
an error. Compared: transformers 5.23, mlx-lm 0.32.2; tests/reference holds the proof.
"""

import copy
from collections.abc import Callable
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.models.modeling_gpt_neo import ModelArgs as GPTNeoArgs
from mlx_svd.source.config_tables import DEFAULTS, FIXED, REQUIRED
from mlx_svd.source.rope import mlx_scaling, read_rope, require_full_rotation


def normalize_config(
    config: dict[str, Any], warn: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """A new config: the given one, and all that mlx-lm needs to compute the same logits.

    Given values stay. Normalizing twice changes nothing. Raises MlxSvdError that names the key
    and the remedy when a key is missing, when two places contradict each other, or when mlx-lm
    would compute another model. ``warn`` gets a sentence where mlx-lm's model differs from the
    original in some lengths of text only (sliding windows, longrope).
    """
    family = config.get("model_type")
    if family not in DEFAULTS:
        raise MlxSvdError(
            f"model_type {family!r} is not supported; supported: {', '.join(DEFAULTS)}"
        )
    out = copy.deepcopy(config)
    for key in REQUIRED[family]:
        if out.get(key) is None:
            raise MlxSvdError(f"{key} is missing; download config.json again")
    for key, value in DEFAULTS[family].items():
        out.setdefault(key, value)
    for key, allowed in FIXED[family].items():
        if key in out and out[key] not in allowed:
            raise _unsupported(family, key, out[key], " or ".join(map(repr, allowed)))
    if family == "gpt2":
        _finish_gpt2(out)
    elif family == "gpt_neo":
        _finish_gpt_neo(out)
    elif family == "gpt_neox":
        _finish_gpt_neox(out)
    else:
        _finish_heads(out)
        _check_windows(out, warn)
        if family == "gemma3_text":
            _finish_gemma3(out)
        else:
            _finish_rope(out, warn)
    return out


def _unsupported(family: str, key: str, value: Any, wanted: str) -> MlxSvdError:
    return MlxSvdError(
        f"{key}={value!r} is not what mlx-lm's {family} computes, so the result would be "
        f"another model; use a model with {key} {wanted}"
    )


def _finish_gpt2(out: dict[str, Any]) -> None:
    if out.get("n_inner") not in (None, 4 * out["n_embd"]):
        raise _unsupported("gpt2", "n_inner", out["n_inner"], f"null or {4 * out['n_embd']}")
    out.setdefault("n_ctx", out["n_positions"])


def _finish_gpt_neo(out: dict[str, Any]) -> None:
    try:
        args = GPTNeoArgs.from_dict(out)
    except ValueError as error:
        raise MlxSvdError(f"{error}; correct it or use another GPT-Neo model") from error
    out.setdefault("attention_layers", args.attention_layers)


def _finish_gpt_neox(out: dict[str, Any]) -> None:
    hidden = out["hidden_size"]
    if out.get("intermediate_size", 4 * hidden) != 4 * hidden:
        raise _unsupported("gpt_neox", "intermediate_size", out["intermediate_size"], "4 x hidden")
    rope = read_rope(out, theta_key="rotary_emb_base", share_key="rotary_pct")
    mlx_scaling(rope, out)
    out["rotary_emb_base"] = rope.get("rope_theta", 10000.0)
    out["rotary_pct"] = rope.get("partial_rotary_factor", 0.25)


def _finish_heads(out: dict[str, Any]) -> None:
    """Null head counts, head sizes that mlx-lm derives, and soft caps that it cannot switch off."""
    family, heads = out["model_type"], out["num_attention_heads"]
    if out.get("num_key_value_heads") is None:
        out["num_key_value_heads"] = heads
    if out.get("head_dim", 0) is None:
        out["head_dim"] = out["hidden_size"] // heads
    if (
        family in ("qwen2", "phi3")
        and "head_dim" in out
        and out["head_dim"] * heads != (out["hidden_size"])
    ):
        raise _unsupported(family, "head_dim", out["head_dim"], "hidden_size / heads")
    if family == "gemma2":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if out[key] is None:
                raise _unsupported(family, key, None, "a number")


def _check_windows(out: dict[str, Any], warn: Callable[[str], None]) -> None:
    """Warn of sliding windows that mlx-lm's model ignores: texts may get longer than the window."""
    family, layers = out["model_type"], out["num_hidden_layers"]
    types = out.get("layer_types")
    if family in ("llama", "mistral") and set(types or ()) - {"full_attention"}:
        raise MlxSvdError(
            f"layer_types: transformers' {family} ignores them, mlx-lm's obeys; remove the key "
            "or use the model_type the model was trained as"
        )
    if family in ("llama", "gemma3_text"):
        return
    if family in ("mistral", "phi3"):
        slides = True
    elif types is not None:
        slides = "sliding_attention" in types
    elif family == "gemma2":
        slides = True
    else:
        slides = out.get("use_sliding_window", False) and layers > out.get("max_window_layers", 28)
    if family in ("qwen2", "qwen3") and not out.get("use_sliding_window", False):
        slides = False
    window = out.get("sliding_window", 4096 if family.startswith("qwen") else None)
    if slides and window is not None and window < out.get("max_position_embeddings", 0):
        warn(
            f"sliding_window={window}: mlx-lm's {family} attends to all tokens, so it differs "
            f"from the original model in texts longer than {window} tokens"
        )


def _finish_rope(out: dict[str, Any], warn: Callable[[str], None]) -> None:
    family = out["model_type"]
    rope = read_rope(out)
    scaling = mlx_scaling(rope, out, warn)
    if family == "phi3":
        out["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1.0)
    else:
        require_full_rotation(rope, family)
    out["rope_theta"] = rope.get("rope_theta", 10000.0)
    if scaling is not None:
        out["rope_scaling"] = (out.get("rope_scaling") or {}) | scaling


def _finish_gemma3(out: dict[str, Any]) -> None:
    """Two rotary bases, and layer types as the one number that mlx-lm takes."""
    full = read_rope(out, "full_attention")
    local = read_rope(out, "sliding_attention", scaling_key=None, theta_key="rope_local_base_freq")
    for rope in (full, local):
        require_full_rotation(rope, "gemma3_text")
    if local["rope_type"] != "default":
        raise _unsupported("gemma3_text", "rope_type", local["rope_type"], "'default' locally")
    scaling = mlx_scaling(full, out)
    out["rope_theta"] = full.get("rope_theta", 1_000_000.0)
    out["rope_local_base_freq"] = local.get("rope_theta", 10_000.0)
    if scaling is not None:
        out["rope_scaling"] = (out.get("rope_scaling") or {}) | scaling
    _finish_pattern(out)


def _finish_pattern(out: dict[str, Any]) -> None:
    layers, given = out["num_hidden_layers"], out.get("sliding_window_pattern")
    types = out.get("layer_types")
    if types is None:
        period = given or out.get("_sliding_window_pattern") or 6
    elif "full_attention" in types:
        period = types.index("full_attention") + 1
    else:
        period = layers + 1
    regular = [
        "full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)
    ]
    if period > layers or (types is not None and types != regular):
        raise MlxSvdError(
            f"layer_types={types or regular}: mlx-lm's gemma3_text needs a full_attention layer "
            "after every n-1 sliding ones; use a model with such a pattern"
        )
    if given not in (None, period):
        raise MlxSvdError(
            f"sliding_window_pattern is {given} but layer_types repeats every {period}; keep the "
            "one the model was trained with"
        )
    out["sliding_window_pattern"] = period
