"""Second moments of queries, keys and values on a text: what spectra and bases are made from.

Notation: Hkv key-value heads of d dimensions, D = Hkv d; the heads' vectors of one token are
concatenated. Queries of grouped-query attention: the j-th queries of all groups are concatenated
to one D-vector, and the moments of all j are added.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.calibrate.text import Windows
from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.observe import Attended, observed


@dataclass(frozen=True)
class LayerMoments:
    """Means over ``tokens`` of one layer, float64.

    keys (D, D): E[k k^T] as cached (after the rotation), key_mean (D,); queries (D, D): E of the
    sum over j of q_j q_j^T; joint (2D, 2D): E[y y^T] of y = (unrotated key, value), joint_mean
    (2D,); heads: (Hq, Hkv); rotary: whether keys are rotated at all.
    """

    keys: np.ndarray
    key_mean: np.ndarray
    queries: np.ndarray
    joint: np.ndarray
    joint_mean: np.ndarray
    heads: tuple[int, int]
    tokens: int
    rotary: bool

    @property
    def head_dim(self) -> int:
        return len(self.key_mean) // self.heads[1]

    def second(self, name: str, centred: bool) -> np.ndarray:
        """(D, D) second moment, or covariance, of "K" (as cached), "K unrotated" or "V"."""
        size = len(self.key_mean)
        part = slice(0, size) if name == "K unrotated" else slice(size, None)
        second, mean = self.joint[part, part], self.joint_mean[part]
        if name == "K":
            second, mean = self.keys, self.key_mean
        return second - np.outer(mean, mean) if centred else second


def measure_moments(
    model: nn.Module,
    model_type: str,
    windows: Windows | np.ndarray,
    advance: Callable[[str], None] = lambda done: None,
) -> list[LayerMoments]:
    """Run windows (N, L) of token ids through the model; one entry for each layer.

    ``advance`` is told the number of each finished window. Raises MlxSvdError that names the layer
    where an activation is not finite, and for an architecture that cannot be observed.
    """
    tokens = windows.tokens if isinstance(windows, Windows) else windows
    sums: list[dict[str, np.ndarray]] = []
    first: list[Attended] = []
    with observed(model, model_type) as seen:
        for number, window in enumerate(tokens):
            seen.clear()
            mx.eval(model(mx.array(window)[None]))
            first = first or list(seen)
            for layer, attended in enumerate(seen):
                if layer == len(sums):
                    sums.append({})
                for name, value in _products(attended).items():
                    if not np.isfinite(value).all():
                        raise MlxSvdError(
                            f"layer {layer}: its {name} hold NaN or Inf on this text; use --dtype "
                            "float32 or check the weights"
                        )
                    sums[layer][name] = sums[layer].get(name, 0.0) + value
            advance(str(number))
    count = len(tokens) * tokens.shape[1]
    return [
        LayerMoments(
            **{name: value / count for name, value in layer.items()},
            heads=(attended.queries.shape[1], attended.keys.shape[1]),
            tokens=count,
            rotary=attended.rotary,
        )
        for layer, attended in zip(sums, first, strict=True)
    ]


def token_rows(x: mx.array) -> np.ndarray:
    """(1, H, L, d) -> (L, H d) float64: the heads of each token side by side."""
    rows = x[0].transpose(1, 0, 2).reshape(x.shape[2], -1)
    return np.array(rows.astype(mx.float32)).astype(np.float64)


def _products(attended: Attended) -> dict[str, np.ndarray]:
    # Float64: covariances are small differences where a mean is large, as it is for keys.
    keys, values = token_rows(attended.keys), token_rows(attended.values)
    both = np.hstack([token_rows(attended.unrotated), values])
    queries = 0.0
    n_heads, n_kv_heads = attended.queries.shape[1], attended.keys.shape[1]
    for j in range(n_heads // n_kv_heads):
        rows = token_rows(attended.queries[:, j :: n_heads // n_kv_heads])
        queries = queries + rows.T @ rows
    return {
        "keys": keys.T @ keys,
        "key_mean": keys.sum(0),
        "queries": queries,
        "joint": both.T @ both,
        "joint_mean": both.sum(0),
    }
