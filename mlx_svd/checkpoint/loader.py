"""Load a checkpoint as mlx-lm's model and tokenizer, without running code from the checkpoint."""

from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_svd.checkpoint.layout import CONFIG_FORMAT, DTYPES
from mlx_svd.errors import MlxSvdError
from mlx_svd.models import modeling_mlx_svd
from mlx_svd.source.families import parameter_names
from mlx_svd.source.headers import read_headers
from mlx_svd.source.resolve import CHECKPOINT_PATTERNS, resolve_model
from mlx_svd.source.source import BAD_VALUE, brief, normalized, read_config

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
_REMEDY = "copy or download the checkpoint again"
_SECTION_KEYS = {"version", "base_model", "revision", "plan_digest", "projections", "fused"}
_ENTRY_KEYS = {"form", "shape", "bias", "fused", "ranks", "rank_limit", "bytes"}
_ENTRY_KEYS |= {"energy", "relative_error"}


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
    folder = resolve_model(str(path_or_hf_repo), revision, CHECKPOINT_PATTERNS).path
    model, config = load_model(folder, dtype=dtype, lazy=lazy)
    return model, load_tokenizer(folder, config, tokenizer_config)


def load_model(
    folder: Path, *, dtype: str | None = None, lazy: bool = False
) -> tuple[nn.Module, dict]:
    """(model, config) of a local folder; as :func:`load` without the tokenizer."""
    from mlx_lm.utils import load_model as mlx_lm_load_model

    if dtype not in (None, *DTYPES):
        raise MlxSvdError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}")
    overrides, module = model_definition(folder)
    read_headers(folder)  # names a truncated file, where mlx-lm would say less
    try:
        model, config = mlx_lm_load_model(
            folder,
            lazy=lazy or dtype is not None,
            model_config=overrides,
            get_model_classes=lambda config: (_model_class(module, config), module.ModelArgs),
        )
    except BAD_VALUE as error:
        raise MlxSvdError(
            f"{folder}: weights and config.json do not fit together: {brief(error)}; {_REMEDY}"
        ) from error
    if dtype:
        _cast(model, getattr(mx, dtype))
    if not lazy:
        mx.eval(model.parameters())
    return model, config


def load_tokenizer(folder: Path, config: dict, options: dict[str, Any] | None = None) -> Any:
    """mlx-lm's tokenizer of a local folder with this config; options: ``tokenizer_config`` of
    :func:`load`. Raises MlxSvdError if there is none or it is damaged."""
    from mlx_lm.utils import load_tokenizer as mlx_lm_load_tokenizer

    remedy = "copy the tokenizer files of the original model into this folder"
    # Without them transformers makes an empty tokenizer and says nothing.
    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        raise MlxSvdError(f"{folder}: holds no tokenizer; {remedy}")
    try:
        return mlx_lm_load_tokenizer(
            folder,
            {"trust_remote_code": False, **(options or {})},
            eos_token_ids=config.get("eos_token_id"),
        )
    # The tokenizers library, written in Rust, raises plain Exception for a damaged file.
    except Exception as error:
        raise MlxSvdError(
            f"{folder}: the tokenizer cannot be loaded: {brief(error)}; {remedy}"
        ) from error


def model_definition(folder: Path) -> tuple[dict[str, Any], ModuleType]:
    """Config values that mlx-lm needs on top of config.json, and the Python module that defines
    Model and ModelArgs. Raises MlxSvdError for a checkpoint that this version cannot read."""
    path = folder / "config.json"
    config = read_config(folder)
    section = config.get("mlx_svd")
    if section is None and config.get("model_file"):
        raise MlxSvdError(
            f"{path}: needs its own code (model_file {config['model_file']!r}), which mlx-svd "
            "never runs; load it with mlx-lm if you trust it"
        )
    if section is not None:
        _check_section(path, section)
    overrides = normalized(path, config) | {"model_file": None}
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
    config, path = read_config(folder), folder / "config.json"
    if "mlx_svd" not in config:
        raise MlxSvdError(f"{path}: has no mlx_svd section; give a checkpoint made by mlx-svd")
    _check_section(path, config["mlx_svd"])
    return config["mlx_svd"]


def _check_section(path: Path, section: Any) -> None:
    """Raise MlxSvdError for a newer format, or if keys are missing that this one promises."""
    try:
        if section["format"] > CONFIG_FORMAT:
            raise MlxSvdError(
                f"{path}: made by a newer mlx-svd ({section.get('version')}); upgrade mlx-svd"
            )
        entries = section["projections"].values()
        missing = _SECTION_KEYS - section.keys() or {
            key for entry in entries for key in _ENTRY_KEYS - entry.keys()
        }
    except BAD_VALUE as error:
        raise MlxSvdError(
            f"{path}: its mlx_svd section is damaged ({brief(error)}); {_REMEDY}"
        ) from error
    if missing:
        raise MlxSvdError(f"{path}: its mlx_svd section lacks {min(missing)}; {_REMEDY}")


def tensor_bytes(folder: Path) -> dict[str, int]:
    """Bytes of every tensor on disk, by name."""
    return {name: header.nbytes for name, header in read_headers(folder).items()}
