"""Recipes in YAML files, and saved plans in JSON as recipes that repeat them exactly."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from mlx_svd.checkpoint.layout import Quantization, quantization
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.budget import Budget, parse_budget
from mlx_svd.plan.choices import parse_choices
from mlx_svd.plan.plan import PLAN_FORMAT
from mlx_svd.plan.policy import RankPolicy, parse_energy
from mlx_svd.plan.recipe import Recipe, Rule, parse_projections

_POLICY_KEYS = tuple(f.name for f in fields(RankPolicy))
_BUDGET_KEYS = tuple(f.name for f in fields(Budget))
_CHOICE_KEYS = {"forms", "bits", "group_size"}
_RULE_KEYS = {f.name for f in fields(Rule)} - {"policy", "exact"} | set(_POLICY_KEYS)
_RECIPE_KEYS = {f.name for f in fields(Recipe)}
_RECIPE_KEYS -= {"policy", "quantize", "budget", "choices", "modules"}
_RECIPE_KEYS |= {*_POLICY_KEYS, *_BUDGET_KEYS}
_QUANTIZE_KEYS = {"bits", "group_size", "mode"}


def load_recipe_fields(path: Path) -> dict[str, Any]:
    """Fields of a Recipe that the file gives; the caller adds its own and builds the Recipe.

    Raises MlxSvdError that names the file, the rule and the key.
    """
    if not path.is_file():
        raise MlxSvdError(f"{path}: no such recipe file")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise MlxSvdError(f"{path}: not valid YAML: {reason}") from error
    if not isinstance(content, dict):
        raise MlxSvdError(f"{path}: a recipe is a mapping with keys such as rank_ratio and rules")
    try:
        return _plan_fields(content) if "plan_format" in content else recipe_fields(content)
    except MlxSvdError as error:
        raise MlxSvdError(f"{path}: {error}") from error


def recipe_fields(content: dict) -> dict[str, Any]:
    """The same for the content of a recipe file."""
    _check_keys(content, _RECIPE_KEYS | {"quantize", "choices"}, "the recipe")
    apart = (*_POLICY_KEYS, *_BUDGET_KEYS)
    chosen = {k: v for k, v in content.items() if k in _RECIPE_KEYS and k not in apart}
    _check_types(chosen, "the recipe")
    if "projections" in chosen:
        chosen["projections"] = parse_projections(chosen["projections"])
    if policy := _policy(content):
        chosen["policy"] = policy
    if budget := {k: content[k] for k in _BUDGET_KEYS if content.get(k) is not None}:
        chosen["budget"] = parse_budget(**budget)
    if content.get("choices"):
        _check_keys(content["choices"], _CHOICE_KEYS, "choices")
        chosen["choices"] = parse_choices(**content["choices"])
    if "rules" in chosen:
        chosen["rules"] = tuple(_rule(i + 1, rule) for i, rule in enumerate(chosen["rules"]))
    if content.get("quantize"):
        _check_keys(content["quantize"], _QUANTIZE_KEYS, "quantize")
        chosen["quantize"] = quantization(**content["quantize"])
    return chosen


def _rule(number: int, content: Any) -> Rule:
    where = f"rule {number}"
    if not isinstance(content, dict):
        raise MlxSvdError(f"{where}: a rule is a mapping with keys such as match and rank")
    _check_keys(content, _RULE_KEYS, where)
    chosen = {k: v for k, v in content.items() if k not in _POLICY_KEYS}
    _check_types(chosen, where)
    for key in ("match", "layers", "ranks"):
        if key in chosen and not isinstance(chosen[key], list):
            chosen[key] = [chosen[key]]
        if key in chosen:
            chosen[key] = tuple(chosen[key])
    try:
        if "projections" in chosen:
            chosen["projections"] = parse_projections(chosen["projections"])
        rule = Rule(**chosen, policy=_policy(content))
    except MlxSvdError as error:
        raise MlxSvdError(f"{where}: {error}") from error
    if rule.skip and (rule.policy or rule.ranks or rule.form):
        raise MlxSvdError(f"{where}: skip truncates nothing; remove its rank, energy or form")
    if rule.ranks and rule.policy:
        raise MlxSvdError(f"{where}: give ranks or one of {', '.join(_POLICY_KEYS)}, not both")
    return rule


def _policy(content: dict) -> RankPolicy | None:
    given = {k: content[k] for k in _POLICY_KEYS if content.get(k) is not None}
    for key in given.keys() - {"energy"}:
        if isinstance(given[key], bool) or not isinstance(given[key], (int, float)):
            raise MlxSvdError(f"{key}: {given[key]!r} is not a number")
    if "energy" in given:
        shares = given["energy"]
        joined = ":".join(map(str, shares)) if isinstance(shares, list) else str(shares)
        given["energy"] = parse_energy(joined)
    return RankPolicy(**given) if given else None


def _quantization(entry: dict | None) -> Quantization | None:
    return quantization(**entry) if entry else None


_TYPES: dict[str, type | tuple[type, ...]] = {
    "match": (str, list),
    "layers": (int, list),
    "ranks": list,
    "projections": (str, list),
    "rules": list,
    "min_dim": int,
    "rank_multiple": int,
    "bits": int,
    "skip": bool,
    "per_head": bool,
    "form": str,
    "dtype": str,
    "scorer": str,
    "allocation": str,
    "importance_window": int,
    "factor_bits": int,
}


def _check_types(content: dict, where: str) -> None:
    for key, value in content.items():
        if not isinstance(value, _TYPES[key]) or (isinstance(value, bool) and _TYPES[key] is int):
            raise MlxSvdError(f"{where}: {key}: {value!r} is not a valid value")
        numbers = value if key in ("layers", "ranks") and isinstance(value, list) else []
        if not all(type(i) is int for i in numbers):
            raise MlxSvdError(f"{where}: {key}: {value!r} is not a list of whole numbers")


def _check_keys(content: dict, known: set[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise MlxSvdError(f"{where} has an unknown key {key!r}; use {', '.join(sorted(known))}")


def _plan_fields(plan: dict) -> dict[str, Any]:
    """A saved plan as a recipe: one rule for each projection, with its exact rank and form."""
    if plan["plan_format"] != PLAN_FORMAT:
        raise MlxSvdError(
            f"is a saved plan of format {plan['plan_format']}, this version reads {PLAN_FORMAT}; "
            "use the mlx-svd that saved it, or a newer one"
        )
    rules = []
    try:
        for entry in plan["projections"]:
            if entry["projection"] not in plan["compressible"]:
                continue
            ranks = entry["ranks"]
            rules.append(
                Rule(
                    match=(entry["path"],),
                    skip=ranks is None,
                    ranks=tuple(ranks) if ranks else None,
                    form=None if ranks is None else entry["form"],
                    exact=(_quantization(entry["quantization"]), _quantization(entry["factors"])),
                )
            )
        quantize = plan["quantize"]
        return {
            "projections": tuple(plan["compressible"]),
            "rules": tuple(rules),
            "quantize": quantization(**quantize) if quantize else None,
            "rank_multiple": plan["rank_multiple"],
            "dtype": plan["dtype"],
            "scorer": plan["scorer"],
            "importance_window": plan["importance_window"],
            "modules": {path: _quantization(q) for path, q in plan["modules"].items()},
        }
    except (KeyError, TypeError) as error:
        raise MlxSvdError(f"not a complete saved plan: {error} is missing or wrong") from error
