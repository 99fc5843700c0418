"""Look at the inputs and output gradients of linear modules while a model runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_svd.errors import MlxSvdError
from mlx_svd.source.families import LinearModule
from mlx_svd.source.source import all_finite
from mlx_svd.x86 import cross_entropy, numpy_exponentials


class Tap(nn.Module):
    """Stands in for a linear module: keeps its last input, and adds ``shift`` to its output, so
    that the gradient with respect to the shift is the gradient of the output."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self._seen: dict[str, mx.array | None] = {"input": None, "shift": None}

    def __call__(self, x: mx.array) -> mx.array:
        self._seen["input"] = x
        y = self.module(x)
        shift = self._seen["shift"]
        return y if shift is None else y + shift


@contextmanager
def tapped(model: nn.Module, linears: list[LinearModule]) -> Iterator[list[Tap]]:
    """The model with taps on ``linears``, in their order; taken off again at the end."""
    modules = dict(model.named_modules())
    taps = {linear.path: Tap(modules[linear.path]) for linear in linears}
    model.update_modules(tree_unflatten(list(taps.items())))
    try:
        yield list(taps.values())
    finally:
        originals = [(path, tap.module) for path, tap in taps.items()]
        model.update_modules(tree_unflatten(originals))


def inputs_of(taps: list[Tap]) -> list[mx.array]:
    """The last input (tokens, n) of each tapped module, float32."""
    return [_rows(tap._seen["input"]) for tap in taps]


def gradients_of(
    model: nn.Module, taps: list[Tap], tokens: mx.array, outputs: list[int]
) -> tuple[mx.array, list[mx.array], list[mx.array]]:
    """Loss summed over the predictions of ``tokens`` (B, L), and for each tapped module its input
    and the gradient at its output, (B (L - 1), n) and (.., m); outputs: m of each module."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def loss(shifts: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
        for tap, shift in zip(taps, shifts, strict=True):
            tap._seen["shift"] = shift
        logits = model(inputs).astype(mx.float32)
        total = cross_entropy(logits, targets).sum()
        return total, [tap._seen["input"] for tap in taps]

    dtypes = [tap.module.weight.dtype for tap in taps]
    shifts = [mx.zeros((*inputs.shape, m), t) for m, t in zip(outputs, dtypes, strict=True)]
    with numpy_exponentials(model):
        (total, seen), gradients = mx.value_and_grad(loss)(shifts)
    return total, [_rows(x) for x in seen], [_rows(g) for g in gradients]


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1]).astype(mx.float32)


def require_finite(model: nn.Module, origin: str, prefix: str = "") -> None:
    """Raise MlxSvdError that names the first parameter with NaN or Inf; origin and prefix (of a
    part of a model): for the message."""
    for name, parameter in tree_flatten(model.parameters()):
        if mx.issubdtype(parameter.dtype, mx.floating) and not all_finite(parameter):
            raise MlxSvdError(
                f"{origin}: tensor {prefix}{name} holds NaN or Inf; the source weights are damaged"
            )
