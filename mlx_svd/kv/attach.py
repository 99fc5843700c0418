"""Let a model's attention read latent caches.

``attach`` gives every attention module a function that projects its queries by the dual basis and
expands its outputs, around mlx-lm's own ``scaled_dot_product_attention`` (see ``attention``), and
gives the model a ``make_cache``, so that mlx-lm's programs make latent caches by themselves.
The weights stay as they are, except with ``fold``.
"""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.attention import output_projections, rebind_attention
from mlx_svd.kv.bases_file import Bases
from mlx_svd.kv.basis import LayerBasis, layer_basis
from mlx_svd.kv.cache import LatentKVCache, QuantizedLatentKVCache
from mlx_svd.kv.components import check_grouping, key_components, value_components
from mlx_svd.kv.fold import fold_layer
from mlx_svd.kv.ranks import Storage, choose_ranks, latent_bytes
from mlx_svd.kv.settings import KVSettings

# Of the random gauge of quantized latents.
_SEED = 1


@dataclass
class Attachment:
    """What ``attach`` did. bases: of each layer; bytes_per_token: of all layers, predicted; the
    ranks are counted per group of heads."""

    model: nn.Module
    bases: list[LayerBasis]
    bytes_per_token: float
    undo: list[tuple[Any, str, Any]] = field(repr=False, default_factory=list)

    @property
    def ranks(self) -> list[tuple[int, int]]:
        """(of keys, of values) of each layer."""
        return [basis.ranks for basis in self.bases]

    def detach(self) -> None:
        """Make the model again what it was."""
        for owner, name, value in reversed(self.undo):
            setattr(owner, name, value)
        self.undo.clear()
        # Some classes have a make_cache of their own, which comes back.
        vars(self.model).pop("make_cache", None)


def attach(
    model: nn.Module,
    model_type: str,
    bases: Bases,
    settings: KVSettings,
    itemsize: int | None = None,
) -> Attachment:
    """Make ``model`` keep and read latents of its keys and values.

    Its caches are then latent ones, and a call without a cache projects the same way (without
    quantizing). itemsize: bytes of a number for ``bytes_per_token``, if the model runs in another
    type than it is meant for. Raises MlxSvdError for an architecture, a cache or settings that do
    not fit.
    """
    check_plain_caches(model)
    layers = output_projections(model, model_type)
    if len(layers) != len(bases.layers):
        raise MlxSvdError(
            f"the bases have {len(bases.layers)} layers, the model {len(layers)}; make them from "
            "this model with mlx-svd kv-bases"
        )
    dtype = cache_dtype(model)
    storage = Storage(itemsize or dtype.size, settings.bits, settings.group_size)
    made = layer_bases(layers, bases, settings, storage, dtype)
    attachment = Attachment(
        model,
        made,
        latent_bytes([b.ranks for b in made], [b.groups for b in made], storage),
    )
    try:
        for index, (module, name) in enumerate(layers):
            if settings.fold:
                made[index] = fold_layer(module, name, made[index], attachment.undo)
            original = rebind_attention(module, _attention(made[index]))
            attachment.undo.append((module, "__class__", original))
    except MlxSvdError:
        attachment.detach()
        raise
    model.make_cache = lambda: [_cache(basis, settings) for basis in made]
    return attachment


def check_plain_caches(model: nn.Module) -> None:
    """Raise MlxSvdError if the model is attached already, or keeps other caches than growing ones
    (sliding windows)."""
    if any(type(cache) is not KVCache for cache in make_prompt_cache(model)):
        raise MlxSvdError(
            "the model keeps other caches than plain growing ones (sliding windows, or latents "
            "already); low-rank caches do not support it"
        )


def cache_dtype(model: nn.Module) -> mx.Dtype:
    """The type of the numbers that the model puts into its caches: that of its embeddings."""
    embedding = next(m for _, m in model.named_modules() if hasattr(m, "as_linear"))
    weight = embedding.weight
    return weight.dtype if mx.issubdtype(weight.dtype, mx.floating) else embedding.scales.dtype


def layer_bases(
    layers: list[tuple[nn.Module, str]],
    bases: Bases,
    settings: KVSettings,
    storage: Storage,
    dtype: mx.Dtype,
) -> list[LayerBasis]:
    """The basis of each layer, with ranks chosen over all of them."""
    components = [
        (
            key_components(moments, settings.keys, settings.heads_per_group),
            value_components(
                moments,
                settings.values,
                settings.heads_per_group,
                output_matrix(getattr(module, name), moments.heads[0] * moments.head_dim),
            ),
        )
        for moments, (module, name) in zip(bases.layers, layers, strict=True)
    ]
    ranks = choose_ranks(
        [(keys.energies, values.energies) for keys, values in components],
        storage,
        rank=settings.rank,
        energy=settings.energy,
        bytes_per_token=settings.bytes_per_token,
        heads_per_group=[
            check_grouping(m.heads[1], settings.heads_per_group) for m in bases.layers
        ],
        part=settings.part,
    )
    return [
        layer_basis(keys, values, pair, moments.heads, rotate=_gauge(settings), dtype=dtype)
        for (keys, values), pair, moments in zip(components, ranks, bases.layers, strict=True)
    ]


def output_matrix(module: nn.Module, columns: int) -> np.ndarray:
    """(m, columns) of a linear module in any stored form, by what it makes of the unit vectors."""
    zero = module(mx.zeros((1, columns)))
    matrix = module(mx.eye(columns)) - zero
    return np.array(matrix.astype(mx.float32)).T


def _gauge(settings: KVSettings) -> int | None:
    return _SEED if settings.bits else None


def _cache(basis: LayerBasis, settings: KVSettings) -> Any:
    if settings.bits is None:
        return LatentKVCache(basis)
    return QuantizedLatentKVCache(basis, settings.group_size, settings.bits)


def latents(basis: Any, keys: Any, values: Any, cache: Any, sinks: Any, maker: str) -> tuple:
    """What attention reads: a cache's latents, or those of new keys and values (B, H, L, D) where
    there is no cache. Raises MlxSvdError for attention sinks and for a cache that ``maker`` has not
    made for this basis."""
    if sinks is not None:
        raise MlxSvdError("low-rank caches do not support attention sinks")
    if cache is None:
        return basis.encode(keys, values)
    if getattr(cache, "basis", None) is not basis:
        raise MlxSvdError(
            f"the model reads latents, but was given a {type(cache).__name__}; make its caches "
            f"with make_prompt_cache(model) after {maker}"
        )
    return keys, values


def _attention(basis: LayerBasis) -> Any:
    """``scaled_dot_product_attention`` over latents."""

    def attend(queries, keys, values, cache, scale, mask, sinks=None):
        keys, values = latents(basis, keys, values, cache, sinks, "attach")
        output = scaled_dot_product_attention(
            basis.project(queries), keys, values, cache=cache, scale=scale, mask=mask
        )
        return basis.expanded(output)

    return attend
