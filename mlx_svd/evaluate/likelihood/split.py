"""A causal model in two parts: tokens -> last hidden states, and hidden states -> logits.

Over a vocabulary of 150,000 words the logits cost more than all layers of a small model, and a
scorer needs them at few positions. mlx-lm's models compute them everywhere, each in its own way
(tied or not, soft-capped, inside the body as in GPT-NeoX). So the model's own code runs, and only
the input of its vocabulary projection is intercepted: whatever comes before or after stays as it
is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.x86 import numpy_exponentials

# Largest difference of logits, relative to the largest of them, that rounding explains.
_TOLERANCE = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 4e-2}
_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
_PROJECTIONS = (nn.Linear, nn.QuantizedLinear, *_EMBEDDINGS)


class SplitModel:
    """``hidden`` and ``logits`` of one model, which give the model's own logits together.

    vocabulary: logits per token; layers: how many caches the model takes; mask_axes: axes that an
    attention mask with a batch axis needs (4, or 5 where queries are grouped by their keys).
    Raises MlxSvdError naming the architecture if no such split is found or if its logits differ
    from the model's.
    """

    def __init__(self, model: nn.Module):
        self.model, self.layers = model, len(model.layers)
        self.vocabulary = model(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]
        self._head = self._find_head()
        self._check()

    def hidden(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        attention: Callable[..., mx.array] | None = None,
    ) -> mx.array:
        """tokens (B, L) int32 -> input of the vocabulary projection (B, L, D). attention: in place
        of ``mx.fast.scaled_dot_product_attention``."""
        seen = []
        with (
            numpy_exponentials(self.model, attention=attention),
            _intercepted([self._head], lambda module, x: seen.append(x) or x),
        ):
            # MLX is lazy: the logits that this call describes are never computed.
            self.model(tokens, cache=cache)
        return seen[-1]

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden (n, D) -> logits (n, V) float32."""
        with _intercepted([self._head], lambda module, x: hidden[None]):
            # Nor are the layers before the projection, whose output is not looked at.
            return self.model(mx.zeros((1, 1), dtype=mx.int32))[0].astype(mx.float32)

    def _find_head(self) -> nn.Module:
        """The projection that is applied last: others may have as many outputs by chance."""
        called: list[nn.Module] = []
        candidates = [m for m in self.model.modules() if isinstance(m, _PROJECTIONS)]
        candidates = [m for m in candidates if m.weight.shape[0] == self.vocabulary]
        with _intercepted(candidates, lambda module, x: called.append(module) or x):
            self.model(mx.zeros((1, 1), dtype=mx.int32))
        if not called:
            raise MlxSvdError(
                f"{_name(self.model)}: has no projection onto its {self.vocabulary} words that "
                "mlx-svd can find; it can be generated from, but not be evaluated"
            )
        return called[-1]

    def _check(self) -> None:
        tokens = mx.array(np.arange(2 * 5).reshape(2, 5) % self.vocabulary, dtype=mx.int32)
        expected = self.model(tokens)
        hidden = self.hidden(tokens)
        shape = hidden.shape
        if len(shape) != 3 or shape[:2] != (2, 5):
            raise MlxSvdError(
                f"{_name(self.model)}: its vocabulary projection is given an array of shape "
                f"{shape} for tokens of shape (2, 5); mlx-svd cannot evaluate it"
            )
        found = self.logits(hidden.reshape(10, -1)).reshape(2, 5, -1)
        check_equal(self.model, "hidden states and projection", found, expected)


def check_equal(model: nn.Module, what: str, found: mx.array, expected: mx.array) -> None:
    """Raise MlxSvdError if logits differ by more than rounding; NaN is left to be found later."""
    limit = _TOLERANCE.get(expected.dtype, 4e-2)
    expected = expected.astype(mx.float32)
    if not mx.isfinite(expected).all().item():
        return
    difference = (mx.abs(found - expected).max() / mx.abs(expected).max()).item()
    if not difference <= limit:
        raise MlxSvdError(
            f"{_name(model)}: the logits from {what} differ from the model's own by "
            f"{difference:.1e} of the largest; mlx-svd cannot evaluate this architecture"
        )


def _name(model: nn.Module) -> str:
    return f"model of type {getattr(model, 'model_type', type(model).__name__)}"


@contextmanager
def _intercepted(
    modules: list[nn.Module], function: Callable[[nn.Module, mx.array], mx.array]
) -> Iterator[None]:
    """While it lasts, these projections are applied to function(module, input)."""
    kinds = [type(module) for module in modules]
    for module, kind in zip(modules, kinds, strict=True):
        # An instance's own __call__ is never looked up, so it gets a class of its own.
        name = "as_linear" if issubclass(kind, _EMBEDDINGS) else "__call__"
        object.__setattr__(module, "__class__", _subclass(kind, name, function))
    try:
        yield
    finally:
        for module, kind in zip(modules, kinds, strict=True):
            object.__setattr__(module, "__class__", kind)


def _subclass(kind: type, name: str, function: Callable) -> type:
    original = getattr(kind, name)
    return type(kind.__name__, (kind,), {name: lambda self, x: original(self, function(self, x))})
