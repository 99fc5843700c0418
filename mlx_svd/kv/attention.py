"""A model's attention modules, and how to give one another ``scaled_dot_product_attention``.

mlx-lm's attention classes end in ``scaled_dot_product_attention(queries, keys, values, ...)``, a
global name of their module. A module gets a subclass of its own class whose ``__call__`` is the
original function with this one global replaced: no code is copied, and neither mlx-lm nor another
model in the process is changed.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import mlx.nn as nn

from mlx_svd.errors import MlxSvdError
from mlx_svd.source.families import FAMILIES

_NAME = "scaled_dot_product_attention"


def attention_modules(model: nn.Module, model_type: str) -> list[nn.Module]:
    """The module of each layer that computes attention, first to last."""
    return [parent for parent, _ in output_projections(model, model_type)]


def output_projections(model: nn.Module, model_type: str) -> list[tuple[nn.Module, str]]:
    """(attention module, name of its output projection) of each layer."""
    family = FAMILIES[model_type]
    path = next(path for path, names in family.modules.items() if names == ("o",))
    parent, _, name = path.rpartition(".")
    return [(_child(layer, parent), name) for layer in _child(model, family.layers)]


def _child(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def rebind_attention(module: nn.Module, function: Callable) -> type:
    """Make ``module`` call ``function`` in place of ``scaled_dot_product_attention``; returns the
    class to restore by ``module.__class__ = ...``.

    Raises MlxSvdError for an attention that does not call it under this name (Gemma 2, whose
    scores are capped).
    """
    original = type(module)
    call = original.__call__
    code = getattr(call, "__code__", None)
    if code is None or _NAME not in code.co_names:
        raise MlxSvdError(
            f"{original.__module__}.{original.__name__}: computes its attention itself, so its "
            "keys and values cannot be projected; low-rank caches do not support this architecture"
        )
    rebound = FunctionType(
        code, {**call.__globals__, _NAME: function}, call.__name__, call.__defaults__,
        call.__closure__,
    )  # fmt: skip
    rebound.__kwdefaults__ = call.__kwdefaults__
    module.__class__ = type(original.__name__, (original,), {"__call__": rebound})
    return original
