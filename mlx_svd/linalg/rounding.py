"""MLX's affine quantization with errors spread over the inputs that follow.

Rounding a column moves the outputs; the columns after it, still unrounded, are moved to undo what
they can. With H = E[x x^T] this is GPTQ (Frantar et al., arXiv 2210.17323). Before a group is
rounded its range is shrunk to where the rounding error is smallest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Added to H, as a share of its mean diagonal: keeps the compensation small where the calibration
# has seen little.
DAMPING = 0.02
# Ranges that are tried for each group; outliers are clipped when that costs less.
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)


@dataclass(frozen=True)
class Rounded:
    """codes (m, n) uint8, scales and biases (m, n / group size) as stored."""

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray

    def dense(self) -> np.ndarray:
        """What a reader gets back, (m, n)."""
        size = self.codes.shape[1] // self.scales.shape[1]
        return self.codes * np.repeat(self.scales, size, 1) + np.repeat(self.biases, size, 1)

    def packed(self, bits: int) -> np.ndarray:
        """The codes as MLX stores them: little-endian bits, (m, n * bits / 32) uint32."""
        each = np.unpackbits(self.codes[..., None], axis=-1, count=bits, bitorder="little")
        return np.packbits(each.reshape(len(each), -1), axis=-1, bitorder="little").view("<u4")


def round_compensated(
    weight: np.ndarray,
    second_moment: np.ndarray,
    bits: int,
    group_size: int,
    stored: Callable[[np.ndarray], np.ndarray],
) -> Rounded:
    """Round W (m, n) to ``bits`` bits in groups of inputs.

    second_moment: E[x x^T] (n, n) of the inputs, may be singular; stored: rounds scales and
    biases to the dtype in which they are stored.
    """
    w = weight.astype(np.float64)
    m, n = w.shape
    upper = _inverse_root(second_moment)
    codes = np.empty((m, n), dtype=np.uint8)
    scales, biases = np.empty((2, m, n // group_size))
    for group in range(n // group_size):
        begin, end = group * group_size, (group + 1) * group_size
        scale, bias = _range(w[:, begin:end], bits, stored)
        scales[:, group], biases[:, group] = scale, bias
        divisor = np.where(scale == 0, 1.0, scale)
        errors = np.empty((m, group_size))
        for column in range(begin, end):
            code = np.clip(np.rint((w[:, column] - bias) / divisor), 0, 2**bits - 1)
            codes[:, column] = code
            error = (w[:, column] - code * scale - bias) / upper[column, column]
            w[:, column + 1 : end] -= np.outer(error, upper[column, column + 1 : end])
            errors[:, column - begin] = error
        w[:, end:] -= errors @ upper[begin:end, end:]
    return Rounded(codes, scales, biases)


def _inverse_root(second_moment: np.ndarray) -> np.ndarray:
    """Upper triangular U with U^T U = H^-1."""
    n = len(second_moment)
    amount = DAMPING * np.trace(second_moment) / n or 1.0
    inverse = np.linalg.inv(second_moment + amount * np.eye(n))
    return np.linalg.cholesky((inverse + inverse.T) / 2).T


def _range(
    group: np.ndarray, bits: int, stored: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """scale, bias (m,) of one group (m, g): of the shrunk ranges the one that rounds best."""
    low, high = group.min(1), group.max(1)
    best, chosen = np.full(len(group), np.inf), (np.zeros(len(group)), np.zeros(len(group)))
    for shrink in SHRINKS:
        scale, bias = (stored(a) for a in _mlx_range(low * shrink, high * shrink, bits))
        divisor = np.where(scale == 0, 1.0, scale)[:, None]
        code = np.clip(np.rint((group - bias[:, None]) / divisor), 0, 2**bits - 1)
        error = np.square(group - code * scale[:, None] - bias[:, None]).sum(1)
        better = error < best
        best = np.where(better, error, best)
        chosen = np.where(better, scale, chosen[0]), np.where(better, bias, chosen[1])
    return chosen


def _mlx_range(low: np.ndarray, high: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """scale and bias as mx.quantize chooses them: zero is representable, and the end of the range
    that is farther from it is exact."""
    steps = 2**bits - 1
    scale = np.maximum((high - low) / steps, 1e-7)
    scale = np.where(np.abs(low) > np.abs(high), scale, -scale)
    edge = np.where(np.abs(low) > np.abs(high), low, high)
    at_zero = np.rint(edge / scale)
    exact = at_zero != 0
    scale = np.where(exact, edge / np.where(exact, at_zero, 1.0), scale)
    return scale, np.where(exact, edge, 0.0)
