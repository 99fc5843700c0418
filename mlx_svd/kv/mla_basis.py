"""Keys and values from one joint latent, as in multi-head latent attention, without training.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) caches one latent c = W x per token,
from which all keys and values are made, and a few rotary dimensions. A trained model is brought
into this form as in MHA2MLA (arXiv 2502.14837): some rotary pairs of each head keep their rotation
and are cached as they are, the others lose it, and the un-rotated keys and the values share the
latent given by the truncated SVD of [W_K; W_V]. Losing the rotation changes the model; the papers
train afterwards, here nothing is trained. Models with learned positions lose nothing by it.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.basis import gauge
from mlx_svd.kv.components import decompose, output_weight
from mlx_svd.kv.moments import LayerMoments
from mlx_svd.models.modeling_mlx_svd import SlicedRotary


@dataclass(frozen=True)
class MlaBasis:
    """pairs: rotary pairs kept in each head, p of them; rank r of the latent. encode_keys (Hkv, d -
    2p, r), encode_values (Hkv, d, r), shift (r,): latent = sum over heads, minus shift;
    project_queries (Hq, d - 2p, r); expand (Hq, r, d); constant (Hq, 1, d)."""

    pairs: list[int]
    rank: int
    encode_keys: mx.array
    encode_values: mx.array
    shift: mx.array
    project_queries: mx.array
    expand: mx.array
    constant: mx.array

    def __deepcopy__(self, memo) -> "MlaBasis":
        return self

    def encode(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys (rotary dimensions first) and values (B, Hkv, L, d) -> rotary (B, 1, L, Hkv 2p) and
        latent (B, 1, L, r)."""
        rotary = 2 * len(self.pairs)
        kept = keys[..., :rotary].transpose(0, 2, 1, 3).flatten(2)[:, None]
        latent = keys[..., rotary:] @ self.encode_keys.astype(keys.dtype)
        latent = latent + values @ self.encode_values.astype(values.dtype)
        return kept, latent.sum(axis=1, keepdims=True) - self.shift.astype(latent.dtype)


class PartialRotary(nn.Module):
    """Rotates the chosen pairs only and puts them first; the others follow as they were.
    chosen, others: dimensions of a head."""

    def __init__(self, rope: nn.Module, pairs: list[int], chosen: list[int], others: list[int]):
        super().__init__()
        self._rope = SlicedRotary(rope, pairs) if pairs else None
        self._chosen = mx.array(chosen, dtype=mx.int32)
        self._others = mx.array(others, dtype=mx.int32)

    def __call__(self, x: mx.array, offset=0) -> mx.array:
        if self._rope is None:
            return x
        rotated = self._rope(x[..., self._chosen], offset=offset)
        return mx.concatenate([rotated, x[..., self._others]], axis=-1)


def dimensions(head_dim: int, pairs: list[int]) -> tuple[list[int], list[int]]:
    """(dimensions of the pairs (i, i + d / 2), the others)."""
    chosen = pairs + [i + head_dim // 2 for i in pairs]
    return chosen, [i for i in range(head_dim) if i not in set(chosen)]


def choose_pairs(moments: LayerMoments, rope: Any, pairs: int, length: int) -> list[int]:
    """Pairs whose scores change most when their rotation is left out: E|q|² E|k|² of the pair,
    times E|1 - e^(i θ Δ)|² over distances Δ below ``length``."""
    if rope is None:
        if pairs:
            raise MlxSvdError(f"{pairs} rotary pairs: the model has learned positions; use 0")
        return []
    half = moments.head_dim // 2
    if type(rope) is not nn.RoPE or rope.traditional or rope.dims != moments.head_dim:
        raise MlxSvdError("joint latents support the plain rotation of whole heads only")
    if pairs > half:
        raise MlxSvdError(f"{pairs} rotary pairs: a head has {half}")
    theta = rope.scale / rope.base ** (np.arange(half) / half)
    change = 2 - 2 * np.sinc(theta * length / np.pi)

    def power(second: np.ndarray) -> np.ndarray:
        return np.diagonal(second).reshape(-1, 2, half).sum(axis=1)

    scores = (power(moments.queries) * power(moments.keys)).sum(axis=0) * change
    return sorted(np.argsort(-scores)[:pairs].tolist())


def mla_basis(
    moments: LayerMoments,
    output: np.ndarray,
    rank: int,
    pairs: list[int],
    *,
    rotate: int | None = None,
    dtype: mx.Dtype = mx.float32,
) -> MlaBasis:
    """The joint latent of one layer; output: weight (m, Hq d) of the output projection; rotate: as
    :func:`layer_basis`.

    The latent is the best one for scores and outputs together, each measured in shares of its own
    energy: the SVD of [W_K; W_V] in the metric of real activations.
    """
    (n_heads, n_kv), dim = moments.heads, moments.head_dim
    _, others = dimensions(dim, pairs)
    keys = np.concatenate([np.array(others, dtype=int) + h * dim for h in range(n_kv)])
    values = np.arange(n_kv * dim) + n_kv * dim
    at = np.concatenate([keys, values])
    if not 1 <= rank <= len(at):
        raise MlxSvdError(f"joint latent of {rank} numbers: give 1 to {len(at)}")
    mean = moments.joint_mean[at]
    covariance = moments.joint[np.ix_(at, at)] - np.outer(mean, mean)
    weight = np.zeros_like(covariance)
    n = len(keys)
    # Queries of different heads never meet: the weight is zero between heads.
    same = np.kron(np.eye(n_kv), np.ones((dim, dim)))[np.ix_(keys, keys)]
    for block, part in (
        (slice(0, n), moments.queries[np.ix_(keys, keys)] * same),
        (slice(n, None), output_weight(moments, output)),
    ):
        energy = float((part * covariance[block, block]).sum())
        weight[block, block] = part / max(energy, 1e-300)
    energies, encode, decode = decompose(covariance, weight)
    encode, decode = encode[:, :rank], decode[:rank]
    if rotate is not None:
        encode, decode = gauge(energies[:rank], encode, decode, rotate)

    def by_query_head(part: np.ndarray) -> np.ndarray:
        heads = part.reshape(len(part), n_kv, -1).transpose(1, 0, 2)
        return np.repeat(heads, n_heads // n_kv, axis=0)

    arrays = {
        "encode_keys": encode[:n].reshape(n_kv, -1, rank),
        "encode_values": encode[n:].reshape(n_kv, dim, rank),
        "shift": mean @ encode,
        "project_queries": by_query_head(decode[:, :n]).transpose(0, 2, 1),
        "expand": by_query_head(decode[:, n:]),
        "constant": by_query_head(mean[None, n:]),
    }
    arrays = {k: mx.array(v.astype(np.float32)).astype(dtype) for k, v in arrays.items()}
    return MlaBasis(pairs, rank, **arrays)
