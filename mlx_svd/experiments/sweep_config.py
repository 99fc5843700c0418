"""The YAML file of a sweep."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.methods import check_method
from mlx_svd.experiments.rival_spec import rival_spec
from mlx_svd.finetune.settings import HealSettings
from mlx_svd.plan.recipe import parse_projections
from mlx_svd.plan.recipe_file import load_recipe_fields

_KEYS = {
    "calibration", "heldout", "other", "facts", "speed", "groups", "rivals", "matched", "heal",
    "recipes",
}  # fmt: skip
_GROUP_KEYS = {"name", "projections", "keep_bytes", "bits", "methods"}
# What may follow a method's name, in this order: inputs measured again after compressing what is
# before them; healed afterwards.
SEQUENTIAL, HEALED = " sequential", " healed"


@dataclass(frozen=True)
class Group:
    """Rows that touch the same projections: every method at every share of their bytes."""

    name: str
    projections: tuple[str, ...]
    keep_bytes: tuple[float, ...]
    bits: str | None
    methods: tuple[str, ...]


@dataclass(frozen=True)
class SweepConfig:
    """calibration: {text, windows, length}; material: heldout, other, facts, speed; groups; rivals:
    names for ``rival_spec``; matched: those at whose bytes the budget runs too; heal: settings of
    ``HealSettings``, None = rows are not healed; recipes: name -> fields of ``Recipe``, as files
    for ``compress --config`` hold them."""

    calibration: dict[str, Any]
    material: dict[str, Any]
    groups: tuple[Group, ...]
    rivals: tuple[str, ...]
    matched: tuple[str, ...]
    heal: dict[str, Any] | None
    recipes: dict[str, dict[str, Any]]


def load_sweep_config(path: Path) -> SweepConfig:
    """Read and check a sweep's file; MlxSvdError that names the file and the key."""
    if not path.is_file():
        raise MlxSvdError(f"{path}: no such sweep file")
    try:
        content = yaml.safe_load(path.read_text())
        if not isinstance(content, dict):
            raise MlxSvdError("a sweep is a mapping with keys such as calibration and groups")
        return _config(content, path.parent)
    except yaml.YAMLError as error:
        raise MlxSvdError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except MlxSvdError as error:
        raise MlxSvdError(f"{path}: {error}") from error
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise MlxSvdError(f"{path}: {error!r} is missing or not a valid value") from error


def _config(content: dict, folder: Path) -> SweepConfig:
    _check_keys(content, _KEYS, "the sweep")
    groups = tuple(_group(entry) for entry in content.get("groups", []))
    rivals = tuple(content.get("rivals", []))
    for name in rivals:
        rival_spec(name)
    matched = tuple(content.get("matched", []))
    if unknown := [name for name in matched if name not in rivals]:
        raise MlxSvdError(f"matched: {unknown[0]} is not among the rivals")
    if content.get("heal") is not None:
        HealSettings(**content["heal"])
    # Found from the sweep's own file: recipes lie beside it, and not with the data.
    files = [folder / name for name in content.get("recipes", [])]
    recipes = {path.stem: load_recipe_fields(path) for path in files}
    if not groups and not rivals and not recipes:
        raise MlxSvdError("a sweep needs groups, rivals or recipes")
    if "text" not in content["calibration"]:
        raise MlxSvdError("calibration: needs a text")
    material = {k: content[k] for k in ("heldout", "other", "facts", "speed") if k in content}
    return SweepConfig(
        content["calibration"], material, groups, rivals, matched, content.get("heal"), recipes
    )


def _group(entry: dict) -> Group:
    _check_keys(entry, _GROUP_KEYS, "a group")
    methods = tuple(entry["methods"])
    for method in methods:
        check_method(method.removesuffix(HEALED).removesuffix(SEQUENTIAL))
    bits = entry.get("bits")
    return Group(
        str(entry["name"]),
        parse_projections(entry["projections"]),
        tuple(float(share) for share in entry["keep_bytes"]),
        None if bits is None else str(bits),
        methods,
    )


def _check_keys(content: dict, known: set[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise MlxSvdError(f"{where} has an unknown key {key!r}; use {', '.join(sorted(known))}")
