"""Other ways to the same numbers: what the caches of a dense model hold, and attention over keys
and values that were projected and written back."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache

from mlx_svd.kv.attention import attention_modules, rebind_attention


def cached(model, tokens: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(keys, values) (N, Hkv, L, d) float64 of each layer, from mlx-lm's own cache."""
    caches = [KVCache() for _ in model.layers]
    mx.eval(model(mx.array(tokens), cache=caches))
    found = []
    for cache in caches:
        keys, values = cache.keys_and_values()
        found.append((np.array(keys).astype(np.float64), np.array(values).astype(np.float64)))
    return found


def rows(x: np.ndarray) -> np.ndarray:
    """(N, H, L, d) -> (N L, H d)."""
    return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1] * x.shape[3])


@contextmanager
def written_back(model, model_type: str, maps: list[tuple]) -> Iterator[None]:
    """Keys and values go through affine maps of all heads side by side, x -> x M + c, given as
    ((M, c) of keys, (M, c) of values) by layer, and the dense attention reads the results."""
    originals = []

    def attention(pair):
        def through(x, matrix, constant):
            b, h, length, d = x.shape
            flat = x.transpose(0, 2, 1, 3).reshape(b, length, h * d)
            flat = flat @ mx.array(matrix.astype(np.float32)) + mx.array(
                constant.astype(np.float32)
            )
            return flat.reshape(b, length, h, d).transpose(0, 2, 1, 3)

        def attend(queries, keys, values, cache, scale, mask):
            keys, values = through(keys, *pair[0]), through(values, *pair[1])
            return scaled_dot_product_attention(
                queries, keys, values, cache=None, scale=scale, mask=mask
            )

        return attend

    modules = attention_modules(model, model_type)
    for module, pair in zip(modules, maps, strict=True):
        originals.append((module, rebind_attention(module, attention(pair))))
    try:
        yield
    finally:
        for module, original in originals:
            module.__class__ = original
