"""Rotary position settings: from where transformers 4 and 5 store them to where mlx-lm reads them.

transformers 4 writes `rope_theta` and `rope_scaling` at the top of config.json; transformers 5
nests both in `rope_parameters`, for Gemma 3 once per layer type. mlx-lm reads the former.
Behaviour compared: transformers 5.23 `modeling_rope_utils`, mlx-lm 0.32.2 `rope_utils`.
"""

import math
from collections.abc import Callable
from typing import Any

from mlx_svd.errors import MlxSvdError

# Types that mlx-lm computes as transformers does (dynamic: for one sequence at a time).
_GENERAL = frozenset({"default", "linear", "dynamic", "llama3", "yarn", "longrope"})
ROPE_TYPES = {
    "llama": _GENERAL,
    "mistral": _GENERAL,
    "qwen2": _GENERAL,
    "qwen3": _GENERAL,
    "gemma3_text": _GENERAL,
    "phi3": frozenset({"default", "longrope"}),
    "gemma2": frozenset({"default"}),
    "gpt_neox": frozenset({"default"}),
}
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_NOT_SCALING = ("rope_theta", "partial_rotary_factor")


def read_rope(
    config: dict[str, Any],
    layer_type: str | None = None,
    *,
    scaling_key: str | None = "rope_scaling",
    theta_key: str = "rope_theta",
    share_key: str = "partial_rotary_factor",
) -> dict[str, Any]:
    """All rotary settings of a config as one flat dict, as transformers 5 understands them.

    layer_type: the entry to read where `rope_parameters` is nested by layer type; the keys name
    the top-level entries of the family. `rope_type` is always present ("default" if nowhere
    given), null values are dropped.

    Raises MlxSvdError where two places give different values: transformers 5 would believe the
    nested one, mlx-lm and transformers 4 the top-level one, and only the author knows.
    """
    top = {"rope_theta": config.get(theta_key), "partial_rotary_factor": config.get(share_key)}
    places = [
        ("rope_parameters", _nested(config, layer_type)),
        (scaling_key, config.get(scaling_key) if scaling_key else None),
        ("the top level", top),
    ]
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for place, found in places:
        for key, value in _canonical(found or {}, str(place)).items():
            if merged.setdefault(key, value) != value:
                raise MlxSvdError(
                    f"{key} is {merged[key]!r} in {origin[key]} but {value!r} in {place}; "
                    "keep the one the model was trained with and remove the other"
                )
            origin.setdefault(key, str(place))
    merged.setdefault("rope_type", "default")
    # Phi-3 called its own method "su", then "yarn", before it became "longrope".
    if config.get("model_type") == "phi3" and merged["rope_type"] == "yarn":
        merged["rope_type"] = "longrope"
    return merged


def mlx_scaling(
    rope: dict[str, Any],
    config: dict[str, Any],
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """`rope_scaling` for mlx-lm: complete, and equal in effect to transformers; None if default.

    rope: from :func:`read_rope`; config: needs `model_type` and, for the scaled types,
    `max_position_embeddings`. Raises MlxSvdError for a type or setting that mlx-lm's model of
    this family does not compute as transformers does; ``warn`` gets what differs for some lengths.
    """
    family, kind = config["model_type"], rope["rope_type"]
    if kind not in ROPE_TYPES[family]:
        raise MlxSvdError(
            f"rope_type={kind!r} is not what mlx-lm's {family} computes; use a model whose "
            f"rope_type is one of: {', '.join(sorted(ROPE_TYPES[family]))}"
        )
    if kind == "default":
        return None
    scaling = {key: value for key, value in rope.items() if key not in _NOT_SCALING}
    for key in _REQUIRED.get(kind, ()):
        if key not in scaling:
            raise MlxSvdError(f"rope_type={kind!r} needs {key}, which is missing; add it")
    if kind in ("llama3", "yarn", "longrope"):
        _fill_original_length(scaling, config)
    if kind == "yarn":
        _check_yarn(scaling, config["max_position_embeddings"])
    if kind == "longrope":
        _check_longrope(scaling, config["max_position_embeddings"], warn)
    if family == "phi3" or "type" in (config.get("rope_scaling") or {}):
        scaling["type"] = kind
    return scaling


def require_full_rotation(rope: dict[str, Any], family: str) -> None:
    """Raise MlxSvdError for a partial rotation, which mlx-lm's model of the family ignores."""
    if (share := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise MlxSvdError(
            f"partial_rotary_factor={share!r}: mlx-lm's {family} rotates whole heads; "
            "use a model with partial_rotary_factor 1.0"
        )


def _nested(config: dict[str, Any], layer_type: str | None) -> dict[str, Any] | None:
    """`rope_parameters` for one layer type, whether or not the file nests them by type."""
    parameters = config.get("rope_parameters") or {}
    by_type = [value for value in parameters.values() if isinstance(value, dict)]
    if layer_type is not None:
        if parameters and not by_type:
            raise MlxSvdError(
                f"rope_parameters of {config['model_type']} must be nested by layer type "
                "(full_attention, sliding_attention); transformers ignores a flat one"
            )
        return parameters.get(layer_type)
    if not by_type:
        return parameters
    if any(value != by_type[0] for value in by_type[1:]):
        raise MlxSvdError(
            f"rope_parameters differs between layer types, but mlx-lm's {config['model_type']} "
            "has one setting for all layers; use a model with equal settings"
        )
    return by_type[0]


def _canonical(settings: dict[str, Any], place: str) -> dict[str, Any]:
    """Without nulls, and with `rope_type` only, under its present name."""
    found = {key: value for key, value in settings.items() if value is not None}
    kinds = {
        "longrope" if found[key] == "su" else found[key]
        for key in ("type", "rope_type")
        if key in found
    }
    if len(kinds) > 1:
        raise MlxSvdError(f"type and rope_type in {place} differ; remove the wrong one")
    found.pop("type", None)
    if kinds:
        found["rope_type"] = kinds.pop()
    return found


def _fill_original_length(scaling: dict[str, Any], config: dict[str, Any]) -> None:
    """transformers' default is `max_position_embeddings`; mlx-lm's are 4096 and 8192."""
    key = "original_max_position_embeddings"
    top = config.get(key)
    if top is not None and scaling.setdefault(key, top) != top:
        raise MlxSvdError(
            f"{key} is {top} at the top level but {scaling[key]} in the rope settings; "
            "keep the one the model was trained with and remove the other"
        )
    scaling.setdefault(key, config["max_position_embeddings"])


def _check_yarn(scaling: dict[str, Any], positions: int) -> None:
    """Complete YaRN in place, its attention factor expressed in the `mscale` that mlx-lm reads."""
    if not scaling.get("truncate", True):
        raise MlxSvdError(
            "truncate=false in the yarn settings: mlx-lm always rounds the correction range; "
            "use a model with truncate true"
        )
    factor = scaling.setdefault("factor", positions / scaling["original_max_position_embeddings"])
    for key, default in (("beta_fast", 32), ("beta_slow", 1)):
        scaling[key] = scaling.get(key) or default

    def gain(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    pair = scaling.get("mscale"), scaling.get("mscale_all_dim")
    wanted = scaling.get("attention_factor")
    if wanted is None:
        wanted = gain(pair[0]) / gain(pair[1]) if all(pair) else gain(1)
    stock = gain(scaling.get("mscale", 1)) / gain(scaling.get("mscale_all_dim", 0))
    if math.isclose(stock, wanted, rel_tol=1e-6):
        return
    if pair != (None, None) or factor <= 1:
        raise MlxSvdError(
            f"mscale={pair[0]!r} and mscale_all_dim={pair[1]!r} give attention factor "
            f"{stock:.6g} in mlx-lm but {wanted:.6g} in transformers; remove those two keys"
        )
    scaling["mscale"] = (wanted - 1.0) / (0.1 * math.log(factor))


def _check_longrope(scaling: dict[str, Any], positions: int, warn: Callable[[str], None]) -> None:
    """mlx-lm rotates by `long_factor` at every length, transformers only beyond the original."""
    original = scaling["original_max_position_embeddings"]
    if scaling["short_factor"] != scaling["long_factor"]:
        warn(
            f"rope_type='longrope': mlx-lm uses long_factor for every length, the original model "
            f"short_factor up to {original} tokens; their texts differ up to there"
        )

    def gain(factor: float) -> float:
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0

    stock = gain(positions / original)
    wanted = scaling.get("attention_factor")
    if wanted is None:
        wanted = gain(scaling.get("factor", positions / original))
    if not math.isclose(stock, wanted, rel_tol=1e-6):
        raise MlxSvdError(
            f"longrope's attention factor is {wanted:.6g} in transformers but {stock:.6g} in "
            "mlx-lm, which knows only max_position_embeddings / "
            "original_max_position_embeddings; use a model without attention_factor and factor"
        )
