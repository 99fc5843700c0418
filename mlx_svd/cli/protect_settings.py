"""Options of ``mlx-svd protect`` -> settings: a preset, an arm, and what changes them."""

from dataclasses import replace
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.protection import ARMS, PRESETS, Arm, ProtectSettings, arm_named

# Options of an arm, by the name of its field; the rest are settings or inputs.
_ARM_OPTIONS = (
    "compress", "rank_ratio", "projections", "form", "adapter", "adapter_rank", "adapter_scale",
    "adapter_dropout", "adapter_projections", "kl", "replay", "replay_weight",
)  # fmt: skip
_INPUTS = (
    "model", "mlx_path", "facts", "paraphrases", "conflict", "conflict_count", "data", "text",
    "prompts_file", "conversations", "arm", "preset", "freeze", "freeze_from", "hierarchical",
    "json_",
)  # fmt: skip


def protect_settings(given: dict[str, Any]) -> ProtectSettings:
    """Preset, then arm, then what was given (option -> value, none of them None). Raises
    MlxSvdError for names and shares that cannot be read."""
    preset = {}
    if "preset" in given:
        if given["preset"] not in PRESETS:
            raise MlxSvdError(f"--preset {given['preset']}: use {', '.join(PRESETS)}")
        preset = dict(PRESETS[given["preset"]])
    arm = arm_named(given["arm"]) if "arm" in given else preset.get("arm", ARMS["cf90"])
    changes = {name: given[name] for name in _ARM_OPTIONS if name in given}
    for name in ("projections", "adapter_projections"):
        if name in changes:
            changes[name] = tuple(changes[name].split(","))
    changes |= _freezing(given, arm)
    if changes:
        arm = replace(arm, name=f"{arm.name}, changed", **changes)
    chosen = {k: v for k, v in given.items() if k not in _INPUTS and k not in _ARM_OPTIONS}
    if "accept" in chosen:
        chosen["accept"] = tuple(name.strip() for name in chosen["accept"].split(","))
    if "steps" in chosen:
        preset.pop("epochs", None)
    return ProtectSettings(**preset | {"arm": arm} | chosen)


def _freezing(given: dict[str, Any], arm: Arm) -> dict[str, Any]:
    """Fields of an arm that --freeze, --freeze-from and --hierarchical say."""
    if "hierarchical" in given:
        if "freeze" in given or "freeze_from" in given:
            raise MlxSvdError("--hierarchical: goes without --freeze and --freeze-from")
        try:
            early, late = (float(part) for part in given["hierarchical"].split(":"))
        except ValueError as error:
            raise MlxSvdError(
                f"--hierarchical {given['hierarchical']}: give two shares, as 0.9:0.5"
            ) from error
        return {"freeze": "hierarchical", "early": early, "late": late}
    changes = {}
    if "freeze" in given:
        changes["share"] = given["freeze"]
        if given["freeze"] == 0:
            return {"freeze": "none"}
        if arm.freeze not in ("bottom", "top"):
            changes["freeze"] = "bottom"
    if "freeze_from" in given:
        if given["freeze_from"] not in ("bottom", "top"):
            raise MlxSvdError(f"--freeze-from {given['freeze_from']}: use bottom or top")
        changes["freeze"] = given["freeze_from"]
    return changes
