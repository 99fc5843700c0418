"""One opened source model: its config, its architecture, and its tensors read one by one."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_svd.errors import MlxSvdError
from mlx_svd.models.modeling_mlx_svd import base_module
from mlx_svd.source.config import normalize_config
from mlx_svd.source.families import (
    LinearModule,
    check_supported,
    linear_modules,
    parameter_names,
)
from mlx_svd.source.headers import TensorHeader, read_headers
from mlx_svd.source.resolve import ModelFolder, resolve_model

# Buffers that some exports carry and that no architecture here has as a parameter.
_BUFFER_ENDINGS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".masked_bias")
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# What a wrong value in config.json can raise in the code that uses it.
BAD_VALUE = (
    *(TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError),
    RuntimeError,
)
# Elements of a tensor that are checked for NaN at a time.
_CHECKED_AT_ONCE = 1 << 21
_AGAIN = "download config.json again"


def brief(error: Exception) -> str:
    """What another program's error says, in one line of bounded length."""
    return " ".join(str(error).split())[:200]


def read_config(folder: Path) -> dict:
    """config.json of a model folder; MlxSvdError when it is missing or not JSON."""
    path = folder / "config.json"
    if not path.is_file():
        raise MlxSvdError(f"{folder}: no config.json in this folder; give a Hugging Face model")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MlxSvdError(f"{path}: not valid JSON ({error}); download it again") from error
    except OSError as error:
        raise MlxSvdError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    if not isinstance(config, dict):
        raise MlxSvdError(f"{path}: not a model config; download it again")
    return config


def normalized(
    path: Path, config: dict, warn: Callable[[str], None] = lambda warning: None
) -> dict:
    """``normalize_config`` of what was read from ``path``, which every MlxSvdError names."""
    try:
        check_supported(config.get("model_type"))
        return normalize_config(config, warn)
    except MlxSvdError as error:
        raise MlxSvdError(f"{path}: {error}") from error
    except BAD_VALUE as error:
        raise MlxSvdError(
            f"{path}: holds a value that makes no sense ({brief(error)}); {_AGAIN}"
        ) from error


def all_finite(tensor: mx.array) -> bool:
    """Whether an evaluated tensor has no NaN and no Inf; looks at some rows at a time, because
    the answer for a large embedding would take more memory than its decomposition."""
    if tensor.size <= _CHECKED_AT_ONCE or len(tensor) == 1:
        return mx.isfinite(tensor).all().item()
    step = max(1, _CHECKED_AT_ONCE * len(tensor) // tensor.size)
    return all(all_finite(tensor[i : i + step]) for i in range(0, len(tensor), step))


class TensorStream:
    """The source's tensors under mlx-lm's names. Nothing is in memory until it is taken, and
    what was taken belongs to the caller alone, so that dropping it frees it."""

    def __init__(self, lazy: dict[str, mx.array], origin: str):
        self._lazy = lazy
        self._origin = origin

    def take(self, name: str) -> mx.array:
        """Read one tensor; MlxSvdError if it holds NaN or Inf, or cannot be read."""
        tensor = self._lazy.pop(name)
        try:
            mx.eval(tensor)
        except RuntimeError as error:
            raise MlxSvdError(
                f"{self._origin}: tensor {name} cannot be read: {brief(error)}"
            ) from error
        if not all_finite(tensor):
            raise MlxSvdError(
                f"{self._origin}: tensor {name} holds NaN or Inf; the source weights are damaged"
            )
        return tensor


@dataclass(frozen=True)
class Source:
    """A model to compress. config: normalized for mlx-lm; headers: as in the files; warnings:
    where mlx-lm's model differs from the original."""

    folder: Path
    name: str
    revision: str | None
    config: dict
    headers: dict[str, TensorHeader]
    warnings: tuple[str, ...] = ()

    @cached_property
    def _sanitized(self) -> tuple[nn.Module, dict[str, mx.array]]:
        return self._open()

    def _open(self) -> tuple[nn.Module, dict[str, mx.array]]:
        """The architecture without values, and all tensors, lazy, under its parameter names.

        Always a new model: sanitize may change the one it belongs to (tied embeddings).
        """
        base = base_module(self.config["model_type"])
        try:
            skeleton = base.Model(base.ModelArgs.from_dict(self.config))
        except BAD_VALUE as error:
            raise MlxSvdError(
                f"{self.folder / 'config.json'}: mlx-lm cannot build this "
                f"{self.config['model_type']} model from it: {brief(error)}; {_AGAIN}"
            ) from error
        lazy: dict[str, mx.array] = {}
        for file in sorted({header.file for header in self.headers.values()}):
            try:
                lazy |= mx.load(str(file))
            except RuntimeError as error:
                raise MlxSvdError(
                    f"{file}: unreadable: {brief(error)}; download it again"
                ) from error
        return skeleton, parameter_names(skeleton, self.config["model_type"], lazy)

    @property
    def skeleton(self) -> nn.Module:
        """The original architecture; its parameters are never evaluated."""
        return self._sanitized[0]

    @cached_property
    def parameters(self) -> dict[str, mx.array]:
        """Parameter name -> lazy placeholder with the architecture's shape, in model order."""
        return dict(tree_flatten(self.skeleton.parameters()))

    @cached_property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        """Parameter name -> (shape, dtype) of the source tensor, in model order, checked."""
        lazy = self._sanitized[1]
        for name, placeholder in self.parameters.items():
            if name not in lazy:
                raise MlxSvdError(
                    f"{self.folder}: tensor {name} is missing, which config.json's "
                    f"{self.config['model_type']} model needs; download the model again"
                )
            if lazy[name].shape != placeholder.shape:
                raise MlxSvdError(
                    f"{self.folder}: tensor {name} has shape {lazy[name].shape}, but config.json "
                    f"says {placeholder.shape}; weights and config are of different models"
                )
            if lazy[name].dtype not in _FLOATS:
                raise MlxSvdError(
                    f"{self.folder}: tensor {name} has dtype {lazy[name].dtype}; give the "
                    "original model in bfloat16, float16 or float32"
                )
        unknown = sorted(set(lazy) - set(self.parameters) - set(self.dropped))
        if unknown:
            raise MlxSvdError(
                f"{self.folder}: tensor {unknown[0]} is not part of a "
                f"{self.config['model_type']} model; weights and config do not belong together"
            )
        return {name: (tuple(lazy[name].shape), lazy[name].dtype) for name in self.parameters}

    @cached_property
    def dropped(self) -> list[str]:
        """Source tensors that the architecture computes itself or shares with another."""
        tied = self.config.get("tie_word_embeddings", True)
        return sorted(
            name
            for name in self._sanitized[1]
            if name not in self.parameters
            and (name.endswith(_BUFFER_ENDINGS) or (tied and name.endswith("lm_head.weight")))
        )

    @cached_property
    def linears(self) -> list[LinearModule]:
        """The linear modules that hold projections."""
        found = linear_modules(self.config, self.skeleton)
        if not found:
            raise MlxSvdError(f"{self.folder / 'config.json'}: says no layers; {_AGAIN}")
        return found

    def stream(self) -> TensorStream:
        """A new pass over the tensors."""
        return TensorStream(self._open()[1], str(self.folder))


def open_source(model: str, revision: str | None = None) -> Source:
    """Open a hub id or local folder for compression; only headers and config are read.

    Raises MlxSvdError for everything that :func:`resolve_model`, :func:`read_headers` and
    ``normalize_config`` refuse, and for a model that is already compressed, quantized or needs
    its own code.
    """
    folder: ModelFolder = resolve_model(model, revision)
    path = folder.path / "config.json"
    config = read_config(folder.path)
    if "mlx_svd" in config:
        raise MlxSvdError(f"{path}: already compressed by mlx-svd; give the original model")
    if config.get("quantization") or config.get("quantization_config"):
        raise MlxSvdError(f"{path}: already quantized; give the original, unquantized model")
    if config.get("model_file"):
        raise MlxSvdError(
            f"{path}: needs its own code (model_file {config['model_file']!r}), which mlx-svd "
            "never runs; give the original model"
        )
    warnings: list[str] = []
    config = normalized(path, config, warnings.append)
    headers = read_headers(folder.path)
    return Source(folder.path, folder.name, folder.revision, config, headers, tuple(warnings))
