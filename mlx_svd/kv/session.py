"""The caches of one run of ``generate``: made, filled from a file, saved, measured."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.attach import attach
from mlx_svd.kv.bases_file import BasesInfo, load_bases
from mlx_svd.kv.cache_file import load_latent_caches, save_latent_caches
from mlx_svd.kv.settings import KVSettings


@dataclass
class CacheSession:
    """caches: of each layer, empty or filled from a file; bytes_per_token: predicted; metadata:
    what a prompt-cache file of these caches carries."""

    caches: list[Any]
    bytes_per_token: float
    metadata: dict[str, str] = field(repr=False)

    def save(self, path: Path) -> None:
        """Write a prompt-cache file with everything that the caches have seen."""
        save_latent_caches(path, self.caches, self.metadata)

    @property
    def tokens(self) -> int:
        """How many tokens the caches hold."""
        return int(self.caches[0].offset)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, which grow by 256 tokens at a time."""
        return sum(cache.nbytes for cache in self.caches)


def open_session(
    model: nn.Module,
    folder: Path,
    bases: Path,
    settings: KVSettings,
    prompt_cache_file: Path | None = None,
) -> CacheSession:
    """Attach ``bases`` to a model loaded from ``folder`` and make its caches.

    prompt_cache_file: fill them from there. Raises MlxSvdError for a file or settings that do not
    fit.
    """
    known = load_bases(bases, folder)
    attachment = attach(model, known.info.model_type, known, settings)
    metadata = {
        "model": known.info.model,
        "bases": _bases_digest(known.info),
        "settings": settings.digest,
    }
    caches = make_prompt_cache(model)
    if prompt_cache_file is not None:
        caches = load_latent_caches(prompt_cache_file, caches, metadata)
    return CacheSession(caches, attachment.bytes_per_token, metadata)


def quantized_session(model: nn.Module, bits: int, group_size: int) -> list[Any]:
    """mlx-lm's own quantized caches, from the first token on. Raises MlxSvdError if a head does not
    divide into groups or the model keeps other caches."""
    try:
        return [c.to_quantized(group_size, bits) for c in make_prompt_cache(model)]
    except (AttributeError, NotImplementedError) as error:
        raise MlxSvdError(
            "--kv-bits: mlx-lm has no quantized form of this model's caches"
        ) from error


def _bases_digest(info: BasesInfo) -> str:
    content = [info.digest, info.text, info.windows, info.length]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
