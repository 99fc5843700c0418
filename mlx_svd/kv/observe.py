"""Queries, keys and values of every layer while a model runs, before and after the rotation."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from mlx_svd.kv.attention import attention_modules, rebind_attention


@dataclass(frozen=True)
class Attended:
    """What one attention call saw. queries (B, Hq, L, d); keys, values (B, Hkv, L, d), as a cache
    would store them; unrotated (B, Hkv, L, d): the keys before the rotary positions, the keys
    themselves where a model has none."""

    queries: mx.array
    keys: mx.array
    values: mx.array
    unrotated: mx.array

    @property
    def rotary(self) -> bool:
        """Whether the model rotates its keys."""
        return self.unrotated is not self.keys


@contextmanager
def observed(model: nn.Module, model_type: str) -> Iterator[list[Attended]]:
    """A list that a forward pass without a cache fills, one entry a layer; clear it before each.

    Raises MlxSvdError for an architecture whose attention cannot be observed.
    """
    seen: list[Attended] = []
    rotations: list[tuple[mx.array, mx.array]] = []

    def attend(queries, keys, values, cache, scale, mask, **options):
        # The keys that arrive are the very object that the rotation returned.
        before = next((x for x, y in rotations if y is keys), keys)
        rotations.clear()
        seen.append(Attended(queries, keys, values, before))
        return scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=scale, mask=mask, **options
        )

    def rotate(self, x, *args, **options):
        y = super(type(self), self).__call__(x, *args, **options)
        rotations.append((x, y))
        return y

    restored: list[tuple[nn.Module, type]] = []
    try:
        for module in attention_modules(model, model_type):
            restored.append((module, type(module)))
            rebind_attention(module, attend)
            if (rope := getattr(module, "rope", None)) is not None:
                original = type(rope)
                restored.append((rope, original))
                rope.__class__ = type(original.__name__, (original,), {"__call__": rotate})
        yield seen
    finally:
        for module, original in restored:
            module.__class__ = original
