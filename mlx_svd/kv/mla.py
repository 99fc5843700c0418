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
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache

from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.attach import Attachment, cache_dtype, check_plain_caches, output_matrix
from mlx_svd.kv.attention import output_projections, rebind_attention
from mlx_svd.kv.bases_file import Bases
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


class MlaCache(KVCache):
    """mlx-lm's growing cache; ``keys`` are the rotary parts, ``values`` the joint latents. The
    sequences of a batch must have equal lengths."""

    def __init__(self, basis: MlaBasis):
        super().__init__()
        self.basis = basis

    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(*self.basis.encode(keys, values))

    def to_quantized(self, group_size: int = 64, bits: int = 4):
        raise MlxSvdError("joint latents cannot be quantized here; leave --kv-bits out")

    @classmethod
    def merge(cls, caches):
        raise MlxSvdError("joint latents of different lengths cannot be batched here")


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


def attach_mla(
    model: nn.Module, model_type: str, bases: Bases, rank: int, pairs: int = 0
) -> Attachment:
    """Make ``model`` keep a joint latent of ``rank`` numbers a layer and ``pairs`` rotary pairs a
    key-value head (0 where it has learned positions).

    The latent is the best one for scores and outputs together, each measured in shares of its own
    energy: the SVD of [W_K; W_V] in the metric of real activations. Pairs are chosen by what the
    scores would lose with their rotation. Raises MlxSvdError for settings that do not fit.
    """
    check_plain_caches(model)
    layers = output_projections(model, model_type)
    made, undo = [], []
    for (module, name), moments in zip(layers, bases.layers, strict=True):
        rope = getattr(module, "rope", None)
        chosen = _choose_pairs(moments, rope, pairs, bases.info.length)
        output = output_matrix(getattr(module, name), moments.heads[0] * moments.head_dim)
        made.append(mla_basis(moments, output, rank, chosen, cache_dtype(model)))
        if rope is not None:
            first, rest = _dimensions(moments.head_dim, chosen)
            module.rope = PartialRotary(rope, chosen, first, rest)
            undo.append((module, "rope", rope))
        undo.append((module, "__class__", rebind_attention(module, _attention(made[-1]))))
    model.make_cache = lambda: [MlaCache(basis) for basis in made]
    numbers = sum(
        b.rank + 2 * len(b.pairs) * m.heads[1] for b, m in zip(made, bases.layers, strict=True)
    )
    return Attachment(model, made, numbers * cache_dtype(model).size, undo)


def _dimensions(head_dim: int, pairs: list[int]) -> tuple[list[int], list[int]]:
    """(dimensions of the pairs (i, i + d / 2), the others)."""
    chosen = pairs + [i + head_dim // 2 for i in pairs]
    return chosen, [i for i in range(head_dim) if i not in set(chosen)]


def _choose_pairs(moments: LayerMoments, rope: Any, pairs: int, length: int) -> list[int]:
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
    moments: LayerMoments, output: np.ndarray, rank: int, pairs: list[int], dtype: mx.Dtype
) -> MlaBasis:
    """The joint latent of one layer; output: weight (m, Hq d) of the output projection."""
    (n_heads, n_kv), dim = moments.heads, moments.head_dim
    _, others = _dimensions(dim, pairs)
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
    _, encode, decode = decompose(covariance, weight)
    encode, decode = encode[:, :rank], decode[:rank]

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


def _attention(basis: MlaBasis) -> Any:
    rotary = 2 * len(basis.pairs)

    def attend(queries, keys, values, cache, scale, mask, sinks=None):
        if sinks is not None:
            raise MlxSvdError("low-rank caches do not support attention sinks")
        if cache is None:
            keys, values = basis.encode(keys, values)
        elif not isinstance(cache, MlaCache):
            raise MlxSvdError(
                f"the model reads joint latents, but was given a {type(cache).__name__}; make its "
                "caches with make_prompt_cache(model) after attach_mla"
            )
        projected = queries[..., rotary:] @ basis.project_queries.astype(queries.dtype)
        if rotary:
            mask = _rotary_scores(queries[..., :rotary] * scale, keys, mask)
        values = values.astype(queries.dtype)
        output = mx.fast.scaled_dot_product_attention(
            projected, values, values, scale=scale, mask=mask
        )
        return output @ basis.expand.astype(output.dtype) + basis.constant.astype(output.dtype)

    return attend


def _rotary_scores(queries: mx.array, kept: mx.array, mask: Any) -> mx.array:
    """The scores (B, Hq, L, T) of the rotary parts, with the mask: an additive mask for the rest.
    queries (B, Hq, L, 2p); kept (B, 1, T, Hkv 2p)."""
    batch, heads, length, rotary = queries.shape
    keys = kept[:, 0].reshape(batch, kept.shape[2], -1, rotary).transpose(0, 2, 3, 1)
    grouped = queries.reshape(batch, keys.shape[1], -1, length, rotary)
    scores = (grouped @ keys[:, :, None].astype(queries.dtype)).reshape(batch, heads, length, -1)
    if mask is None:
        return scores
    if isinstance(mask, str):
        mask = create_causal_mask(length, scores.shape[-1] - length)
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return scores + mask
