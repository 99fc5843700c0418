"""The small files of a checkpoint: config, saved plan, card, model code, tokenizer."""

import json
from pathlib import Path

import mlx_svd
from mlx_svd import models
from mlx_svd.checkpoint.card import model_card
from mlx_svd.checkpoint.layout import CONFIG_FORMAT, Quantization
from mlx_svd.models import own_architecture
from mlx_svd.plan.plan import Plan, ProjectionPlan
from mlx_svd.plan.units import stays_fused
from mlx_svd.source.resolve import COPIED_FILES, PLAN_FILE
from mlx_svd.source.source import Source

MODEL_FILE = "modeling_mlx_svd.py"


def checkpoint_files(
    source: Source, plan: Plan, records: dict[str, dict], command: str
) -> dict[str, bytes]:
    """File name -> content. records: projection path -> {energy, relative_error}."""
    config = checkpoint_config(source, plan, records)
    files = {
        path.name: path.read_bytes()
        for pattern in COPIED_FILES
        for path in sorted(source.folder.glob(pattern))
        if path.is_file()
    }
    files |= model_files(config)
    files[PLAN_FILE] = _json(plan.to_json())
    files["README.md"] = model_card(config, plan.to_json(), source.folder, command).encode()
    files["config.json"] = _json(dict(sorted(config.items())))
    return files


def checkpoint_config(source: Source, plan: Plan, records: dict[str, dict]) -> dict:
    """The source's config with the sections that mlx-lm and mlx-svd read."""
    config = {k: v for k, v in source.config.items() if k not in ("_name_or_path", "auto_map")}
    split = {
        linear.path: linear
        for linear in source.linears
        if linear.fused and not stays_fused(linear, plan.by_path)
    }
    config["mlx_svd"] = {
        "format": CONFIG_FORMAT,
        "version": mlx_svd.__version__,
        "base_model": plan.base_model,
        "revision": plan.revision,
        "plan_digest": plan.digest,
        "projections": {
            p.path: _entry(p, p.projection.module in split, records[p.path])
            for p in plan.projections
            if p.projection.name in plan.compressible or p.projection.module in split
        },
        "fused": {
            path: {
                "parts": [p.name for p in linear.projections],
                "interleaved_heads": linear.interleaved_heads,
            }
            for path, linear in split.items()
        },
    }
    if plan.dtype:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = plan.dtype
    if quantization := _quantization(plan, split):
        config["quantization"] = config["quantization_config"] = quantization
    changed_modules = any(p.form != "dense" for p in plan.projections) or split
    if changed_modules:
        config["model_file"] = MODEL_FILE
    elif own_architecture(plan.model_type).is_file():
        config["model_file"] = own_architecture(plan.model_type).name
    return config


def _entry(p: ProjectionPlan, fused: bool, record: dict) -> dict:
    return {
        "projection": p.projection.name,
        "layer": p.projection.layer,
        "shape": list(p.projection.shape),
        "bias": p.projection.bias,
        "fused": fused,
        "form": p.form,
        "ranks": list(p.ranks) if p.ranks else None,
        "rank_limit": p.limit,
        "bytes": p.bytes_after,
        **({"stored_shape": list(p.stored_shape)} if p.stored_shape else {}),
        **record,
    }


def _quantization(plan: Plan, split: dict) -> dict | None:
    """mlx-lm's ``quantization`` section: the default, and every module that differs from it."""
    used = [p.quantization for p in plan.projections if p.quantization]
    used += [q for q in plan.modules.values() if q]
    default = plan.quantize or (used[0] if used else None)
    if default is None:
        return None
    section = default.config()
    # mlx-lm quantizes what has an entry, so a weight that its groups do not divide must have none.
    packed = {t.name.removesuffix(".scales") for t in plan.tensors if t.name.endswith(".scales")}
    for p in plan.projections:
        path = p.path if p.projection.module in split else p.projection.module
        for linear, q in _linears(path, p).items():
            if q and q != default and linear in packed:
                section[linear] = q.config()
    for path, q in plan.modules.items():
        if q and q != default and path in packed:
            section[path] = q.config()
    return section


def _linears(path: str, p: ProjectionPlan) -> dict[str, Quantization | None]:
    """Paths of the Linear children that hold a projection's weights, and their quantization."""
    if p.form in ("dense", "sliced"):
        return {path: p.quantization}
    if p.form == "corrected":
        factors = {f"{path}.{part}": p.factors for part in ("down", "up")}
        return {f"{path}.base": p.quantization, **factors}
    heads = [path] if len(p.ranks) == 1 else [f"{path}.heads.{i}" for i in range(len(p.ranks))]
    return {f"{head}.{part}": p.quantization for head in heads for part in ("down", "up")}


def model_files(config: dict) -> dict[str, bytes]:
    """The model code that ``model_file`` needs, copied as it is."""
    if "model_file" not in config:
        return {}
    paths = {Path(models.__file__).with_name(config["model_file"])}
    if own_architecture(config["model_type"]).is_file():
        paths.add(own_architecture(config["model_type"]))
    return {path.name: path.read_bytes() for path in paths}


def _json(content: dict) -> bytes:
    return json.dumps(content, indent=4).encode()
