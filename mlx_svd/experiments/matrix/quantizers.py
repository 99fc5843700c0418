"""Weights rounded and multiplied back: what each quantizer does to a matrix, and its bytes.

tensor, channel: the seeds' symmetric rounding, scale = max abs(x) / (2^(bits - 1) - 1), of the
whole tensor or of each output row. group: MLX's affine quantization. compensated: the same codes
and groups, with rounding errors compensated (GPTQ, arXiv 2210.17323). MLX stores only the last two;
the bytes of the first two are counted with one float16 scale for each tensor or row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.checkpoint.layout import quantization
from mlx_svd.errors import MlxSvdError
from mlx_svd.linalg.rounding import round_compensated
from mlx_svd.plan.forms import Storage
from mlx_svd.source.families import Projection

GRANULARITIES = ("tensor", "channel", "group", "compensated")
_SCALE_BYTES = 2


@dataclass(frozen=True)
class Quantizer:
    """granularity: one of ``GRANULARITIES``; bits: of a weight; group_size: inputs that share a
    scale (group, compensated). Raises MlxSvdError for what cannot be."""

    granularity: str
    bits: int = 8
    group_size: int = 64

    def __post_init__(self):
        if self.granularity not in GRANULARITIES:
            raise MlxSvdError(f"quantize {self.granularity}: use {', '.join(GRANULARITIES)}")
        if self.grouped:
            quantization(self.bits, self.group_size)
        elif not 2 <= self.bits <= 8:
            raise MlxSvdError(f"quantize {self.granularity}: bits {self.bits}, give 2 to 8")

    @property
    def grouped(self) -> bool:
        """Whether MLX can store it."""
        return self.granularity in ("group", "compensated")

    def fills_groups(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor can be cut into groups."""
        return len(shape) > 1 and shape[-1] % self.group_size == 0

    def rounded(self, weight: np.ndarray, second: np.ndarray | None = None) -> np.ndarray:
        """A tensor as it reads after quantization, float64; second: E[x x^T] (n, n) of a matrix's
        inputs, for compensated rounding. Raises MlxSvdError for columns that fill no groups."""
        if not self.grouped:
            return symmetric(weight, self.bits, by_row=self.granularity == "channel")
        if weight.shape[-1] % self.group_size:
            raise MlxSvdError(
                f"quantize {self.granularity}: {weight.shape[-1]} columns are no multiple of the "
                f"group size {self.group_size}; give another group_size"
            )
        if self.granularity == "compensated" and second is not None:
            found = round_compensated(weight, second, self.bits, self.group_size, _float16)
            return found.dense()
        # In float16, as a file would hold scales and offsets.
        packed = mx.quantize(mx.array(weight.astype(np.float16)), self.group_size, self.bits)
        dense = mx.dequantize(*packed, group_size=self.group_size, bits=self.bits)
        return np.array(dense.astype(mx.float32), dtype=np.float64)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a quantized tensor and its scales, without bias."""
        size = int(np.prod(shape))
        if self.grouped:
            return size * self.bits // 8 + 2 * _SCALE_BYTES * size // self.group_size
        rows = shape[0] if self.granularity == "channel" and len(shape) > 1 else 1
        return -(-size * self.bits // 8) + _SCALE_BYTES * rows

    def projection_bytes(self, projection: Projection, dtype: mx.Dtype) -> int:
        """Bytes of a quantized projection with its bias, of a grouped one as a plan counts them."""
        if self.grouped:
            chosen = quantization(self.bits, self.group_size)
            return Storage(projection, dtype, chosen).nbytes("dense", (0,))
        bias = projection.shape[0] * dtype.size if projection.bias else 0
        return self.nbytes(projection.shape) + bias


def symmetric(weight: np.ndarray, bits: int, *, by_row: bool) -> np.ndarray:
    """Round to multiples of max abs(x) / (2^(bits - 1) - 1), of the tensor or of each row."""
    weight = weight.astype(np.float64)
    axis = -1 if by_row and weight.ndim > 1 else None
    largest = np.abs(weight).max(axis=axis, keepdims=True)
    scale = largest / (2 ** (bits - 1) - 1)
    return np.round(weight / np.where(scale > 0, scale, 1.0)) * scale


def _float16(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float64)


@contextmanager
def quantize_model(model: nn.Module, quantizer: Quantizer) -> Iterator[nn.Module]:
    """A model with the ``weight`` of every module as it reads after quantization, the embedding,
    the head and the norms too (the seeds' way; grouped: what fills groups); the originals come back
    at the end."""
    originals = {
        path: module.weight
        for path, module in model.named_modules()
        if isinstance(module.get("weight"), mx.array)
    }
    modules = dict(model.named_modules())
    try:
        for path, weight in originals.items():
            values = np.array(weight.astype(mx.float32))
            if quantizer.grouped and not quantizer.fills_groups(values.shape):
                continue
            new = mx.array(quantizer.rounded(values).astype(np.float32))
            modules[path].weight = new.astype(weight.dtype)
        mx.eval(model.parameters())
        yield model
    finally:
        for path, weight in originals.items():
            modules[path].weight = weight
