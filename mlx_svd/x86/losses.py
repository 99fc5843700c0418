"""Losses over the vocabulary, by numpy where MLX's exponentials are slow."""

import mlx.core as mx
import mlx.nn as nn

from mlx_svd.x86 import pointwise
from mlx_svd.x86.substitute import slow_exponentials


def logsumexp(logits: mx.array) -> mx.array:
    """log(sum(exp(logits))) over the last axis: (..., V) -> (...)."""
    if logits.dtype == mx.float32 and slow_exponentials():
        return pointwise.logsumexp(logits)
    return mx.logsumexp(logits, axis=-1)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """-log P(target) in nats: (..., V), integer (...) -> (...)."""
    if logits.dtype == mx.float32 and slow_exponentials():
        return pointwise.cross_entropy(logits, targets)
    return nn.losses.cross_entropy(logits, targets)
