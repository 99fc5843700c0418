"""A model's transformer blocks, run one after the other on the hidden states of all windows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.source.families import FAMILIES
from mlx_svd.x86 import numpy_exponentials


class Blocks:
    """Only one block's weights are in memory at a time, beside the hidden states of every window.

    open_model: the model, with lazy weights; called once for each block, so that what a block has
    read is freed with it. model_type: as in the config; tokens: (N, L) inputs.
    """

    def __init__(self, open_model: Callable[[], nn.Module], model_type: str, tokens: np.ndarray):
        self._open, self._family = open_model, model_type
        model = open_model()
        # hidden: the input (1, L, d) of the next block for each window, evaluated.
        self.hidden: list[mx.array] = []
        with recorded(block_list(model, model_type)) as calls:
            for window in tokens:
                calls.clear()
                model(mx.array(window)[None])  # a graph; nothing but the first input is evaluated
                self.hidden.append(calls[0].args[0])
                mx.eval(self.hidden[-1])
        # Masks and the like are the same for all windows, which have one length.
        self._rest = [(call.args[1:], call.options) for call in calls]

    def __len__(self) -> int:
        return len(self._rest)

    def path(self, index: int) -> str:
        """Module path of a block."""
        return f"{FAMILIES[self._family].layers}.{index}"

    def open(self, index: int) -> tuple[nn.Module, nn.Module]:
        """(a new lazy model, its block ``index``)."""
        model = self._open()
        return model, block_list(model, self._family)[index]

    def outputs(self, index: int, block: nn.Module) -> Iterator[mx.array]:
        """What the block makes of each window's hidden states, lazily."""
        args, options = self._rest[index]
        for hidden in self.hidden:
            with numpy_exponentials(block):
                output = block(hidden, *args, **options)
            yield output

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace the hidden states by the block's outputs."""
        for window, output in enumerate(self.outputs(index, block)):
            mx.eval(output)
            self.hidden[window] = output


@dataclass(frozen=True)
class Call:
    """One call of a block: its arguments, the hidden states first, and what it returned."""

    args: tuple
    options: dict[str, Any]
    output: mx.array


def block_list(model: nn.Module, model_type: str) -> list[nn.Module]:
    """The transformer blocks of a model, in order."""
    layers: Any = model
    for name in FAMILIES[model_type].layers.split("."):
        layers = getattr(layers, name)
    return layers


@contextmanager
def recorded(layers: list[nn.Module]) -> Iterator[list[Call]]:
    """Every call of these layers, in order; arrays are as lazy as the model left them. The layers
    keep their identity and attributes, which models look at."""
    calls: list[Call] = []
    originals = [type(layer) for layer in layers]

    def record(self, *args, **options):
        output = super(type(self), self).__call__(*args, **options)
        calls.append(Call(args, options, output))
        return output

    for layer, original in zip(layers, originals, strict=True):
        layer.__class__ = type(original.__name__, (original,), {"__call__": record})
    try:
        yield calls
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.__class__ = original
