"""Prompt-cache files of latents, in mlx-lm's format.

The arrays are stored under mlx-lm's own cache classes, with what they are in the metadata. The
``model`` entry, which mlx-lm compares, says that they are latents, so that stock mlx-lm refuses
the file for the plain model.
"""

from pathlib import Path
from typing import Any

from mlx_lm.models.cache import KVCache, QuantizedKVCache, load_prompt_cache, save_prompt_cache

from mlx_svd.checkpoint.disk import disk_errors
from mlx_svd.errors import MlxSvdError

_FOLDED = "mlx-svd latents of "


def save_latent_caches(path: Path, caches: list[Any], metadata: dict[str, str]) -> None:
    """Write a prompt-cache file; metadata: strings that a reader must know, "model" among them."""
    stock = []
    for cache in caches:
        plain = QuantizedKVCache() if isinstance(cache, QuantizedKVCache) else KVCache()
        plain.state = cache.state
        stock.append(plain)
    metadata = metadata | {"model": _FOLDED + metadata["model"]}
    # mx.save_safetensors adds an ending to other names.
    partial = path.with_name(path.name + ".partial.safetensors")
    with disk_errors(path.parent, "--save-prompt-cache"):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_prompt_cache(str(partial), stock, metadata)
        partial.rename(path)


def load_latent_caches(path: Path, empty: list[Any], metadata: dict[str, str]) -> list[Any]:
    """Caches with the saved latents.

    empty: new caches of the attached model, which are filled; metadata: what the file was saved
    with. Raises MlxSvdError for a file that does not fit, and names what differs.
    """
    if not path.is_file():
        raise MlxSvdError(f"{path}: no such prompt-cache file; make one with --save-prompt-cache")
    try:
        saved, found = load_prompt_cache(str(path), return_metadata=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise MlxSvdError(f"{path}: is no prompt-cache file; make it again") from error
    for key, value in (metadata | {"model": _FOLDED + metadata["model"]}).items():
        if found.get(key) != value:
            raise MlxSvdError(
                f"{path}: was saved with another {key}; use the model, bases and options that it "
                "was made with, or make it again"
            )
    if len(saved) != len(empty):
        raise MlxSvdError(f"{path}: holds {len(saved)} layers, the model has {len(empty)}")
    for cache, plain in zip(empty, saved, strict=True):
        if isinstance(cache, QuantizedKVCache) != isinstance(plain, QuantizedKVCache):
            raise MlxSvdError(f"{path}: was saved with other --kv-bits; make it again")
        cache.state = plain.state
    return empty
