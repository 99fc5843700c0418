"""Float32 matrices -> the tensors that a checkpoint stores, and what storing them cost."""

import mlx.core as mx
import numpy as np

from mlx_svd.checkpoint.layout import Quantization
from mlx_svd.compress.decompose import LowRank
from mlx_svd.errors import MlxSvdError
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


def store_low_rank(
    matrix: LowRank, bias: mx.array | None, dtype: mx.Dtype, q: Quantization | None
) -> tuple[list[mx.array], mx.array]:
    """Tensors of one low-rank matrix in the order of ``low_rank_tensors``, and the (m, n) float32
    matrix that they make."""
    parts = {name: mx.array(part) for name, part in matrix.parts.items()}
    if "weight" in parts:
        tensors, read = store_weight(parts["weight"], dtype, q)
    else:
        tensors, down = store_weight(parts["down"], dtype, q)
        up_tensors, up = store_weight(parts["up"], dtype, q)
        tensors += up_tensors
        read = up @ down
        if "order" in parts:
            tensors.append(parts["order"])
            read = mx.concatenate([down, read])[parts["order"]]
    if bias is not None:
        tensors.append(bias.astype(dtype))
    return tensors, read


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
