"""Float32 matrices -> the tensors that a checkpoint stores, and what storing them cost."""

import mlx.core as mx
import numpy as np

from mlx_svd.calibrate.fit import LowRank
from mlx_svd.checkpoint.layout import Quantization
from mlx_svd.errors import MlxSvdError
from mlx_svd.linalg.rounding import Rounded
from mlx_svd.source.source import all_finite


def store_weight(
    weight: mx.array, dtype: mx.Dtype, q: Quantization | None
) -> tuple[list[mx.array], mx.array]:
    """Tensors of one weight (m, n) in the order of ``linear_tensors``, and the float32 matrix
    that a reader gets back from them."""
    cast = weight.astype(dtype)
    if not q or not q.fits(weight.shape):
        return [cast], cast.astype(mx.float32)
    stored = mx.quantize(cast, q.group_size, q.bits, mode=q.mode)
    read = mx.dequantize(*stored, group_size=q.group_size, bits=q.bits, mode=q.mode)
    return list(stored), read.astype(mx.float32)


def store_part(
    part: np.ndarray | Rounded, dtype: mx.Dtype, q: Quantization | None
) -> tuple[list[mx.array], mx.array]:
    """As :func:`store_weight`, for a matrix that may be rounded to its bits already."""
    if not isinstance(part, Rounded):
        return store_weight(mx.array(part), dtype, q)
    scales, biases = (mx.array(a.astype(np.float32)) for a in (part.scales, part.biases))
    stored = [mx.array(part.packed(q.bits)), scales.astype(dtype), biases.astype(dtype)]
    return stored, mx.array(part.dense().astype(np.float32))


def store_low_rank(
    matrix: LowRank,
    bias: mx.array | None,
    dtype: mx.Dtype,
    q: Quantization | None,
    factors: Quantization | None,
) -> tuple[list[mx.array], mx.array]:
    """Tensors of one low-rank matrix in the order of ``low_rank_tensors``, and the (m, n) float32
    matrix that they make."""
    parts = matrix.parts
    biases = [] if bias is None else [bias.astype(dtype)]
    if "weight" in parts:
        tensors, read = store_part(parts["weight"], dtype, q)
        return tensors + biases, read
    down_tensors, down = store_part(parts["down"], dtype, factors if "base" in parts else q)
    up_tensors, up = store_part(parts["up"], dtype, factors if "base" in parts else q)
    tensors, read = down_tensors + up_tensors, up @ down
    if "base" in parts:
        base_tensors, base = store_part(parts["base"], dtype, q)
        return base_tensors + tensors + biases, base + read
    if "order" in parts:
        order = mx.array(parts["order"])
        tensors.append(order)
        read = mx.concatenate([down, read])[order]
    return tensors + biases, read


def squared_error(weight: mx.array, read: mx.array) -> float:
    """sum((W - W')^2) in float32 products; weight and read: (m, n)."""
    return float(mx.square(weight.astype(mx.float32) - read).sum().item())


def squared_norm(weight: mx.array) -> float:
    """sum(W^2)."""
    return float(mx.square(weight.astype(mx.float32)).sum().item())


def check_range(path: str, tensors: list[mx.array], dtype: mx.Dtype) -> None:
    """Raise MlxSvdError if a value does not fit into the stored dtype (float16 ends at 65504)."""
    for tensor in tensors:
        if mx.issubdtype(tensor.dtype, mx.floating) and not all_finite(tensor):
            raise MlxSvdError(f"{path}: a value does not fit into {dtype}; use --dtype bfloat16")


def to_numpy(weight: mx.array) -> np.ndarray:
    """Float32 copy for LAPACK."""
    return np.array(weight.astype(mx.float32))
