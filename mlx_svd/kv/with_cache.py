"""A model that is scored through its prompt caches, and caches that are fast to score with."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from mlx_svd.kv.basis import LayerBasis


class WithCache(nn.Module):
    """Calls ``model`` on whole windows with new caches each time, so that every position reads
    what the caches keep of the ones before."""

    def __init__(self, model: nn.Module, make_cache: Callable[[], list[Any]]):
        super().__init__()
        self._model, self._make_cache = model, make_cache

    def __call__(self, tokens: mx.array) -> mx.array:
        return self._model(tokens, cache=self._make_cache())


class WrittenOutKVCache(KVCache):
    """The numbers of a quantized cache, dequantized where they are stored: mlx-lm's (basis None) or
    of latents. Same values, but not the same bytes: MLX's CPU backend multiplies packed numbers
    many times slower. Do not measure speed or bytes on it."""

    def __init__(self, bits: int, group_size: int = 64, basis: LayerBasis | None = None):
        super().__init__()
        self.basis = basis
        self._options = {"group_size": group_size, "bits": bits}

    def update_and_fetch(self, keys, values):
        if self.basis is not None:
            keys, values = self.basis.encode(keys, values)
        return super().update_and_fetch(self._rounded(keys), self._rounded(values))

    def _rounded(self, x: mx.array) -> mx.array:
        return mx.dequantize(*mx.quantize(x, **self._options), **self._options)


def measured_bytes(caches: list[Any], heads: list[tuple[int, int]], dtype: mx.Dtype) -> float:
    """Bytes per token of new caches, read from their arrays after 256 tokens of ``dtype``; heads:
    (key-value heads, head dimension) of each layer."""
    total = 0
    for cache, (n, dim) in zip(caches, heads, strict=True):
        tokens = mx.zeros((1, n, 256, dim), dtype=dtype)
        mx.eval(cache.update_and_fetch(tokens, tokens))
        total += cache.nbytes
    return total / 256
