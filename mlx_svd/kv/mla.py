"""Attention over one joint latent of keys and values (see ``mla_basis``)."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.attach import Attachment, cache_dtype, check_plain_caches, latents, output_matrix
from mlx_svd.kv.attention import output_projections, rebind_attention
from mlx_svd.kv.bases_file import Bases
from mlx_svd.kv.mla_basis import MlaBasis, PartialRotary, choose_pairs, dimensions, mla_basis
from mlx_svd.kv.ranks import Storage

_SEED = 1


class MlaCache(KVCache):
    """mlx-lm's growing cache; ``keys`` are the rotary parts, ``values`` the joint latents. The
    sequences of a batch must have equal lengths."""

    def __init__(self, basis: MlaBasis):
        super().__init__()
        self.basis = basis

    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(*self.basis.encode(keys, values))

    def to_quantized(self, group_size: int = 64, bits: int = 4):
        raise MlxSvdError(
            "joint latents are quantized by attach_mla(bits=...); leave --kv-bits out"
        )

    @classmethod
    def merge(cls, caches):
        raise MlxSvdError("joint latents of different lengths cannot be batched here")


class QuantizedMlaCache(QuantizedKVCache):
    """The same in 8 or 4 bits (mlx-lm's affine groups)."""

    def __init__(self, basis: MlaBasis, group_size: int, bits: int):
        super().__init__(group_size, bits)
        self.basis = basis

    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(*self.basis.encode(keys, values))


def attach_mla(
    model: nn.Module,
    model_type: str,
    bases: Bases,
    rank: int,
    pairs: int = 0,
    *,
    bits: int | None = None,
    group_size: int = 64,
) -> Attachment:
    """Make ``model`` keep a joint latent of ``rank`` numbers a layer and ``pairs`` rotary pairs a
    key-value head (0 where it has learned positions), quantized if ``bits`` says so.

    Pairs are chosen by what the scores would lose with their rotation. The weights stay as they
    are. Raises MlxSvdError for settings that do not fit.
    """
    check_plain_caches(model)
    layers = output_projections(model, model_type)
    dtype, gauge = cache_dtype(model), _SEED if bits else None
    widths = [rank, *(2 * pairs * m.heads[1] for m in bases.layers)]
    if bits and any(width % group_size for width in widths):
        raise MlxSvdError(
            f"joint latents of {rank} numbers and {pairs} pairs are no multiples of the group size "
            f"{group_size}; change them"
        )
    made, undo, changes = [], [], []
    for (module, name), moments in zip(layers, bases.layers, strict=True):
        rope = getattr(module, "rope", None)
        chosen = choose_pairs(moments, rope, pairs, bases.info.length)
        output = output_matrix(getattr(module, name), moments.heads[0] * moments.head_dim)
        made.append(mla_basis(moments, output, rank, chosen, rotate=gauge, dtype=dtype))
        changes.append((module, rope, dimensions(moments.head_dim, chosen)))
    # Nothing is changed before everything is known to fit.
    for (module, rope, (first, rest)), basis in zip(changes, made, strict=True):
        undo.append((module, "__class__", rebind_attention(module, _attention(basis))))
        if rope is not None:
            module.rope = PartialRotary(rope, basis.pairs, first, rest)
            undo.append((module, "rope", rope))

    def make_cache() -> list[Any]:
        if bits is None:
            return [MlaCache(basis) for basis in made]
        return [QuantizedMlaCache(basis, group_size, bits) for basis in made]

    model.make_cache = make_cache
    numbers = sum(
        b.rank + 2 * len(b.pairs) * m.heads[1] for b, m in zip(made, bases.layers, strict=True)
    )
    storage = Storage(dtype.size, bits, group_size)
    return Attachment(model, made, numbers * storage.bytes_per_number, undo)


def _attention(basis: MlaBasis) -> Any:
    rotary = 2 * len(basis.pairs)

    def attend(queries, keys, values, cache, scale, mask, sinks=None):
        keys, values = latents(basis, keys, values, cache, sinks, "attach_mla")
        projected = queries[..., rotary:] @ basis.project_queries.astype(queries.dtype)
        if isinstance(values, tuple):
            packed = {"group_size": cache.group_size, "bits": cache.bits}
            keys = mx.dequantize(*keys, **packed) if rotary else keys[0]
        if rotary:
            mask = _rotary_scores(queries[..., :rotary] * scale, keys, mask)
        if isinstance(values, tuple):
            output = _packed_attention(projected * scale, values, mask, packed)
        else:
            values = values.astype(queries.dtype)
            output = mx.fast.scaled_dot_product_attention(
                projected, values, values, scale=scale, mask=mask
            )
        return output @ basis.expand.astype(output.dtype) + basis.constant.astype(output.dtype)

    return attend


def _packed_attention(queries: mx.array, latent: tuple, mask: Any, packed: dict) -> mx.array:
    """queries (B, Hq, L, r), scaled; latent: packed (B, 1, T, r), keys and values of all heads."""
    batch, heads, length, _ = queries.shape
    rows = queries.reshape(batch, 1, heads * length, -1)
    scores = mx.quantized_matmul(rows, *latent, transpose=True, **packed)
    scores = _masked(scores.reshape(batch, heads, length, -1), mask)
    weights = mx.softmax(scores, axis=-1, precise=True).reshape(batch, 1, heads * length, -1)
    output = mx.quantized_matmul(weights, *latent, transpose=False, **packed)
    return output.reshape(batch, heads, length, -1)


def _rotary_scores(queries: mx.array, kept: mx.array, mask: Any) -> mx.array:
    """The scores (B, Hq, L, T) of the rotary parts, with the mask: an additive mask for the rest.
    queries (B, Hq, L, 2p), scaled; kept (B, 1, T, Hkv 2p)."""
    batch, heads, length, rotary = queries.shape
    keys = kept[:, 0].reshape(batch, kept.shape[2], -1, rotary).transpose(0, 2, 3, 1)
    grouped = queries.reshape(batch, keys.shape[1], -1, length, rotary)
    scores = grouped @ keys[:, :, None].astype(queries.dtype)
    return _masked(scores.reshape(batch, heads, length, -1), mask)


def _masked(scores: mx.array, mask: Any) -> mx.array:
    if mask is None:
        return scores
    if isinstance(mask, str):
        length, total = scores.shape[-2:]
        mask = create_causal_mask(length, total - length)
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return scores + mask
