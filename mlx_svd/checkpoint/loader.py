"""Load a checkpoint as mlx-lm's model and tokenizer, without running code from the checkpoint."""

from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_svd.errors import MlxSvdError
from mlx_svd.models import modeling_mlx_svd
from mlx_svd.source.config import normalize_config
from mlx_svd.source.families import check_supported, parameter_names
from mlx_svd.source.headers import read_headers
from mlx_svd.source.resolve import CHECKPOINT_PATTERNS, resolve_model
from mlx_svd.source.source import read_config

NEWEST_FORMAT = 1


def load(
    path_or_hf_repo: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    lazy: bool = False,
    tokenizer_config: dict[str, Any] | None = None,
) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of an mlx-svd checkpoint, or of an uncompressed model of a supported
    architecture; both are mlx-lm's own types.

    The model code is mlx-svd's own copy: ``model_file`` in the checkpoint is never followed.
    dtype: cast floating-point parameters (float32 is much faster on a CPU). Raises MlxSvdError
    that names the file or tensor.
    """
    from mlx_lm.utils import load_model, load_tokenizer

    folder = resolve_model(str(path_or_hf_repo), revision, CHECKPOINT_PATTERNS).path
    overrides, module = model_definition(folder)
    read_headers(folder)  # names a truncated file, where mlx-lm would say less
    try:
        model, config = load_model(
            folder,
            lazy=lazy or dtype is not None,
            model_config=overrides,
            get_model_classes=lambda config: (_model_class(module, config), module.ModelArgs),
        )
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise MlxSvdError(
            f"{folder}: weights and config.json do not fit together: {reason[:300]}"
        ) from error
    if dtype:
        _cast(model, getattr(mx, dtype))
    if not lazy:
        mx.eval(model.parameters())
    tokenizer = load_tokenizer(
        folder, tokenizer_config, eos_token_ids=config.get("eos_token_id", None)
    )
    return model, tokenizer


def model_definition(folder: Path) -> tuple[dict[str, Any], ModuleType]:
    """Config values that mlx-lm needs on top of config.json, and the Python module that defines
    Model and ModelArgs. Raises MlxSvdError for a checkpoint that this version cannot read."""
    path = folder / "config.json"
    config = read_config(folder)
    check_supported(config.get("model_type"))
    section = config.get("mlx_svd")
    if section is None and config.get("model_file"):
        raise MlxSvdError(
            f"{path}: needs its own code (model_file {config['model_file']!r}), which mlx-svd "
            "never runs; load it with mlx-lm if you trust it"
        )
    if section is not None and section.get("format", 0) > NEWEST_FORMAT:
        raise MlxSvdError(
            f"{path}: made by a newer mlx-svd ({section.get('version')}); upgrade mlx-svd"
        )
    try:
        overrides = normalize_config(config) | {"model_file": None}
    except MlxSvdError as error:
        raise MlxSvdError(f"{path}: {error}") from error
    replaced = section and (
        section["fused"] or any(p["form"] != "dense" for p in section["projections"].values())
    )
    if replaced:
        return overrides, modeling_mlx_svd
    return overrides, modeling_mlx_svd.base_module(config["model_type"])


def _model_class(module: ModuleType, config: dict) -> Any:
    """The model class; for an uncompressed model one that takes transformers' tensor names."""
    if module is modeling_mlx_svd:
        return module.Model

    class Model(module.Model):
        def sanitize(self, weights):
            return parameter_names(super(), config["model_type"], weights)

    return Model


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Floating-point parameters to dtype; packed integers and the scales of the mx modes stay."""
    model.update(
        tree_map(
            lambda p: p.astype(dtype) if mx.issubdtype(p.dtype, mx.floating) else p,
            model.parameters(),
        )
    )


def checkpoint_section(folder: Path) -> dict:
    """The ``mlx_svd`` section of a checkpoint's config; MlxSvdError if it has none."""
    config = read_config(folder)
    if "mlx_svd" not in config:
        raise MlxSvdError(
            f"{folder / 'config.json'}: has no mlx_svd section; not a checkpoint made by mlx-svd"
        )
    return config["mlx_svd"]


def tensor_bytes(folder: Path) -> dict[str, int]:
    """Bytes of every tensor on disk, by name."""
    return {name: header.nbytes for name, header in read_headers(folder).items()}
