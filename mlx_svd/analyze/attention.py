"""The attention scores and probabilities of every layer, as the model's own code computes them.

Model code hands queries, keys (after RoPE and norms), scale and mask to one function,
``scaled_dot_product_attention``; looking at its arguments gives the probabilities with the model's
own positions, windows and scale, whatever the architecture.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.errors import MlxSvdError

_FUNCTION = "scaled_dot_product_attention"


@dataclass(frozen=True)
class AttentionCall:
    """queries (B, H, L, d), keys (B, H_kv, L, d); mask: None, "causal", boolean (True: visible) or
    added to the scores; output (B, H, L, d_v)."""

    queries: mx.array
    keys: mx.array
    scale: float
    mask: Any
    output: mx.array

    def scores(self) -> mx.array:
        """scale Q K^T (B, H, L, L), float32, -inf where a key is not visible."""
        q, k = self.queries.astype(mx.float32), self.keys.astype(mx.float32)
        k = mx.repeat(k, q.shape[1] // k.shape[1], axis=1)
        scores = self.scale * (q @ k.swapaxes(-1, -2))
        mask = self.mask
        if mask is None:
            return scores
        if isinstance(mask, str):
            rows, columns = (mx.arange(n) for n in scores.shape[-2:])
            mask = rows[:, None] + (scores.shape[-1] - scores.shape[-2]) >= columns
        if mask.dtype == mx.bool_:
            return mx.where(mask, scores, -mx.inf)
        return scores + mask


@contextmanager
def recorded_attention(model: nn.Module) -> Iterator[list[AttentionCall]]:
    """Every call of attention while the model runs, in the order of the layers.

    Raises MlxSvdError for an architecture whose code computes attention otherwise.
    """
    calls: list[AttentionCall] = []
    places = {
        id(namespace): namespace
        for module in model.modules()
        if _FUNCTION in (namespace := getattr(type(module).__call__, "__globals__", {}))
        and _FUNCTION in type(module).__call__.__code__.co_names
    }
    if not places:
        raise MlxSvdError(
            "attention probabilities: this architecture's code computes attention in its own way "
            "(softcapping), which is not looked into; leave attention out"
        )
    originals = {key: namespace[_FUNCTION] for key, namespace in places.items()}

    def record(key):
        def attend(queries, keys, values, *args, **options):
            output = originals[key](queries, keys, values, *args, **options)
            calls.append(
                AttentionCall(queries, keys, options["scale"], options.get("mask"), output)
            )
            return output

        return attend

    for key, namespace in places.items():
        namespace[_FUNCTION] = record(key)
    try:
        yield calls
    finally:
        for key, namespace in places.items():
            namespace[_FUNCTION] = originals[key]


def attention_calls(model: nn.Module, window: np.ndarray) -> list[AttentionCall]:
    """Of each layer on one window (L,) of token ids, evaluated."""
    with recorded_attention(model) as calls:
        model(mx.array(window.astype(np.int32))[None])
    mx.eval([[c.queries, c.keys, c.output] for c in calls])
    return list(calls)


@dataclass(frozen=True)
class AttentionSums:
    """One layer, one window. kl: KL(p || p') of the dense probabilities p, summed over heads and
    queries, in nats; queries: how many; scores, probabilities, output: (sum of squared differences,
    sum of squares). Scores are centred over the visible keys first: softmax ignores a constant."""

    kl: float
    queries: int
    scores: tuple[float, float]
    probabilities: tuple[float, float]
    output: tuple[float, float]


def compare_attention(dense: AttentionCall, changed: AttentionCall) -> AttentionSums:
    """The differences of one layer's attention between two states of a model."""
    s, t = dense.scores(), changed.scores()
    visible = s > -mx.inf
    log_p, log_q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (s, t))
    p, q = mx.exp(log_p), mx.exp(log_q)
    kl = mx.where(visible, p * (log_p - log_q), 0.0).sum(axis=-1)
    counts = visible.sum(axis=-1, keepdims=True)
    s, t = (mx.where(visible, x, 0.0) for x in (s, t))
    s, t = (mx.where(visible, x - x.sum(axis=-1, keepdims=True) / counts, 0.0) for x in (s, t))
    return AttentionSums(
        _total(kl),
        int(np.prod(kl.shape)),
        (_total((s - t) ** 2), _total(s * s)),
        (_total((p - q) ** 2), _total(p * p)),
        (_total((dense.output - changed.output) ** 2), _total(dense.output**2)),
    )


def _total(values: mx.array) -> float:
    # Row sums in float32, the rest in float64.
    rows = values.astype(mx.float32).sum(axis=-1) if values.ndim > 3 else values
    return float(np.array(rows, dtype=np.float64).sum())
