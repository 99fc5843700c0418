"""Put numpy's exponentials where a model's own code computes softmax and activations."""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations

from mlx_svd.x86 import pointwise
from mlx_svd.x86.attention import attention

_STOCK_ATTENTION = mx.fast.scaled_dot_product_attention
_STOCK_SWIGLU = activations.swiglu
_STOCK_GELU = nn.gelu_approx


def slow_exponentials() -> bool:
    """Does MLX compute on an x86 processor?"""
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return on_cpu and platform.machine().lower() in ("x86_64", "amd64")


@contextmanager
def numpy_exponentials(
    *models: nn.Module, attention: Callable[..., mx.array] | None = None
) -> Iterator[None]:
    """While it lasts, numpy computes attention's softmax and the activations (SwiGLU, tanh-GELU)
    of these models, in float32 on x86; elsewhere nothing changes. attention: another function in
    place of ``mx.fast.scaled_dot_product_attention``.

    What runs inside computes at once instead of lazily, so only what is needed should run there.
    Other models of this process change too, so not for several threads at once.
    """
    if not slow_exponentials():
        yield
        return
    # A model file's names are found through its classes: some are loaded without a module entry.
    scopes = [type(module).__init__.__globals__ for model in models for module in model.modules()]
    scopes = [scope for scope in scopes if scope.get("swiglu") is _STOCK_SWIGLU]
    before = mx.fast.scaled_dot_product_attention, nn.gelu_approx
    mx.fast.scaled_dot_product_attention, nn.gelu_approx = attention or _attention, _gelu_approx
    for scope in scopes:
        scope["swiglu"] = _swiglu
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention, nn.gelu_approx = before
        for scope in scopes:
            scope["swiglu"] = _STOCK_SWIGLU


def _numpy_can(*arrays: mx.array) -> bool:
    """Are these float32, and have they values? Inside mx.compile they have none."""
    if any(array.dtype != mx.float32 for array in arrays):
        return False
    try:
        mx.eval(arrays)
    except ValueError:
        return False
    return True


def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    same = gate.shape == x.shape
    return pointwise.swiglu(gate, x) if same and _numpy_can(gate, x) else _STOCK_SWIGLU(gate, x)


def _gelu_approx(x: mx.array) -> mx.array:
    return pointwise.gelu_approx(x) if _numpy_can(x) else _STOCK_GELU(x)


def _attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    **others: Any,
) -> mx.array:
    """mx.fast.scaled_dot_product_attention of (B, H, L, D), (B, K, S, D)."""
    others = {name: other for name, other in others.items() if other is not None}
    if others or not _numpy_can(queries, keys, values):
        return _STOCK_ATTENTION(queries, keys, values, scale=scale, mask=mask, **others)
    batch, heads, length, size = queries.shape
    groups = keys.shape[1]
    grouped = queries.reshape(batch, groups, heads // groups, length, size)
    bias = _bias(mask, groups) if isinstance(mask, mx.array) else mx.zeros((1, 1))
    attend = attention(scale, isinstance(mask, str))
    return attend(grouped, keys, values, bias).reshape(batch, heads, length, -1)


def _bias(mask: mx.array, groups: int) -> mx.array:
    """A boolean or additive mask (L, S) or (B, H or 1, L, S), to be added to grouped scores."""
    if mask.dtype == mx.bool_:
        # As in MLX, a query that may look nowhere looks everywhere.
        mask = mx.where(mask, 0.0, mx.finfo(mx.float32).min)
    mask = mask.astype(mx.float32)
    if mask.ndim < 4:
        return mask
    heads = mask.shape[1]
    split = (groups, heads // groups) if heads > 1 else (1, 1)
    return mask.reshape(mask.shape[0], *split, *mask.shape[2:])
