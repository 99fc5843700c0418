"""The file that low-rank caches of a model are made from: moments of its keys, values, queries.

One safetensors file: ``NN.keys`` and so on in float32 for each layer, and in its metadata a JSON
object with the model's digest, the text and the conditions. Bases of every kind, grouping and rank
are made from it when a model is loaded.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mlx_svd.calibrate.statistics import digest_of
from mlx_svd.checkpoint.disk import replace_file
from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.moments import LayerMoments
from mlx_svd.source.headers import read_headers
from mlx_svd.source.source import read_config

FORMAT = 1
_KEY = "mlx_svd_kv"
_ARRAYS = ("keys", "key_mean", "queries", "joint", "joint_mean")


@dataclass(frozen=True)
class BasesInfo:
    """model: its name; digest: of its weights and config; origin, text: of the calibration text
    and the SHA-256 of its tokens; windows, length: how many of how many tokens."""

    model: str
    digest: str
    model_type: str
    origin: str
    text: str
    windows: int
    length: int
    conditions: dict[str, Any]


@dataclass(frozen=True)
class Bases:
    """What a bases file holds: its description and the moments of each layer."""

    info: BasesInfo
    layers: list[LayerMoments]


def folder_digest(folder: Path) -> str:
    """Identifies a model folder, compressed or not."""
    return digest_of(read_config(folder), read_headers(folder))


def save_bases(path: Path, bases: Bases) -> None:
    """Write the file; it appears when it is complete."""
    arrays, layers = {}, []
    for number, layer in enumerate(bases.layers):
        for name in _ARRAYS:
            arrays[f"{number:03d}.{name}"] = getattr(layer, name).astype(np.float32)
        layers.append({"heads": layer.heads, "tokens": layer.tokens, "rotary": layer.rotary})
    content = {"format": FORMAT, "layers": layers, **asdict(bases.info)}
    replace_file(path, save(arrays, {_KEY: json.dumps(content)}))


def load_bases(path: Path, folder: Path | None = None) -> Bases:
    """Read a bases file; folder: of the model that it must belong to.

    Raises MlxSvdError for a file that is none, is damaged, or belongs to another model.
    """
    if not path.is_file():
        raise MlxSvdError(f"{path}: no such file; make one with mlx-svd kv-bases --output {path}")
    try:
        with safe_open(str(path), framework="numpy") as file:
            content = json.loads((file.metadata() or {})[_KEY])
            if content.pop("format") != FORMAT:
                raise MlxSvdError(f"{path}: was made by another version; repeat mlx-svd kv-bases")
            layers = [
                LayerMoments(
                    **{k: file.get_tensor(f"{n:03d}.{k}").astype(np.float64) for k in _ARRAYS},
                    heads=tuple(entry["heads"]),
                    tokens=entry["tokens"],
                    rotary=entry["rotary"],
                )
                for n, entry in enumerate(content.pop("layers"))
            ]
        info = BasesInfo(**content)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise MlxSvdError(
            f"{path}: is no bases file of mlx-svd kv-bases, or is damaged; make it again"
        ) from error
    if folder is not None and info.digest != folder_digest(folder):
        raise MlxSvdError(
            f"{path}: was made from another model ({info.model}); make one for {folder.name} with "
            "mlx-svd kv-bases"
        )
    return Bases(info, layers)
