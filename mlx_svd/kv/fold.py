"""The basis of values put into a layer's weights, so that reading it costs nothing.

The output projection takes the weighted sums of latents: each query head's columns W_h become
W_h Dᵀ, and what the basis loses of the mean goes into its bias. Where v_proj is a module of its
own it gives latents: Eᵀ W_v. In a fused q, k, v (GPT-2, Phi-3, GPT-NeoX) the model's code splits
the output into parts of fixed size, so there the cache encodes the values when they are written.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.basis import LayerBasis, folded


def fold_layer(
    attention: nn.Module, output: str, basis: LayerBasis, undo: list[tuple[Any, str, Any]]
) -> LayerBasis:
    """Fold ``basis`` into the modules of ``attention``; returns what is left of it.

    output: name of its output projection; undo: gets (owner, name, module) of what is replaced.
    Raises MlxSvdError for weights that are not plain matrices.
    """
    projection = _plain(attention, output)
    setattr(attention, output, _folded_output(projection, basis))
    undo.append((attention, output, projection))
    if "v_proj" not in attention:
        return folded(basis, encoded=False)
    values = _plain(attention, "v_proj")
    attention.v_proj = _folded_values(values, basis)
    undo.append((attention, "v_proj", values))
    return folded(basis, encoded=True)


def _plain(attention: nn.Module, name: str) -> nn.Linear:
    module = getattr(attention, name)
    if type(module) is not nn.Linear:
        raise MlxSvdError(
            f"--kv-fold: {name} is a {type(module).__name__}, not a plain matrix; leave --kv-fold "
            "out, or fold the uncompressed model"
        )
    return module


def _folded_output(module: nn.Linear, basis: LayerBasis) -> nn.Linear:
    weight = _float64(module.weight)
    expand, constant = _float64(basis.expand), _float64(basis.constant)
    heads = weight.reshape(len(weight), len(expand), -1)
    bias = np.einsum("mhd,hd->m", heads, constant[:, 0])
    if "bias" in module:
        bias = bias + _float64(module.bias)
    new = np.einsum("mhd,hrd->mhr", heads, expand).reshape(len(weight), -1)
    return _linear(new, bias, module.weight.dtype)


def _folded_values(module: nn.Linear, basis: LayerBasis) -> nn.Linear:
    weight, encode = _float64(module.weight), _float64(basis.encode_values)
    groups, size, rank = encode.shape
    new = np.einsum("gdr,gdn->grn", encode, weight.reshape(groups, size, -1))
    bias = np.zeros((groups, rank))
    if "bias" in module:
        bias = np.einsum("gdr,gd->gr", encode, _float64(module.bias).reshape(groups, size))
    bias = bias - _float64(basis.value_shift)[:, 0]
    return _linear(new.reshape(groups * rank, -1), bias.reshape(-1), module.weight.dtype)


def _linear(weight: np.ndarray, bias: np.ndarray, dtype: mx.Dtype) -> nn.Linear:
    linear = nn.Linear(1, 1)
    linear.weight = mx.array(weight.astype(np.float32)).astype(dtype)
    linear.bias = mx.array(bias.astype(np.float32)).astype(dtype)
    return linear


def _float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)
