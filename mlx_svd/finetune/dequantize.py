"""Quantized layers that multiply with the dequantized matrix, for training.

``quantized_matmul`` is made for a few tokens; here a matrix meets whole windows. On MLX's CPU
backend a float32 product of 512 tokens takes 40 times longer through ``quantized_matmul``. The
values are the same up to rounding, and so are the gradients of scales and biases.
"""

import mlx.core as mx
import mlx.nn as nn


def _dequantized(layer: nn.Module) -> mx.array:
    """(m, n) in the dtype of the scales (bfloat16 for the mx modes)."""
    return mx.dequantize(
        layer["weight"],
        scales=layer["scales"],
        biases=layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )


class _Linear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        x = x @ _dequantized(self).astype(x.dtype).T
        return x + self["bias"] if "bias" in self else x


class _Embedding(nn.QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return x @ _dequantized(self).astype(x.dtype).T


def multiply_dequantized(model: nn.Module) -> None:
    """Make every quantized layer of the model one of these; parameters and names stay."""
    replacements = {nn.QuantizedLinear: _Linear, nn.QuantizedEmbedding: _Embedding}
    for module in model.modules():
        # The class only: parameters, names and everything that the model code holds stay as is.
        module.__class__ = replacements.get(type(module), type(module))
