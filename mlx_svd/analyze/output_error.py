"""How far the outputs of a changed matrix are from those of the original, on given inputs."""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from scipy.special import stdtrit


@dataclass(frozen=True)
class Jackknifed:
    """value: of a statistic over all windows; low, high: its 95 % interval (jackknife over the n
    windows with Student's t; infinite for one window)."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class OutputError:
    """y = W x against z = V x over all inputs and outputs, biases left out.

    cosine: of the two flattened outputs; relative_error: ||y - z|| / ||y||; mse, mae: mean squared
    and absolute difference; max_difference: the largest one; rows: inputs x. A truncation that
    projects the outputs (plain or whitened) has relative_error = sqrt(1 - cosine^2)
    on any inputs; for white inputs and plain truncation cosine^2 is the share of the energy kept.
    """

    cosine: Jackknifed
    relative_error: Jackknifed
    mse: float
    mae: float
    max_difference: float
    rows: int


class OutputErrors:
    """Sums over windows of inputs for one matrix W (m, n) and its replacement V (m, n)."""

    def __init__(self, weight: np.ndarray, changed: np.ndarray):
        self._weight = mx.array(weight.astype(np.float32)).T
        # The difference is formed in float64: at high rank it is smaller than float32 resolves.
        self._error = mx.array((weight.astype(np.float64) - changed).astype(np.float32)).T
        self._outputs = weight.shape[0]
        self._sums: list[tuple[float, ...]] = []
        self._rows = 0

    def add(self, inputs: mx.array) -> None:
        """One window of inputs (rows, n)."""
        y, e = inputs @ self._weight, inputs @ self._error
        # Float32 sums over all outputs at once lose the third digit: first each row, then float64.
        rows = [t.sum(axis=-1) for t in (y * y, y * e, e * e, mx.abs(e))]
        sums = [float(np.array(row, dtype=np.float64).sum()) for row in rows]
        self._sums.append((*sums, mx.abs(e).max().item()))
        self._rows += inputs.shape[0]

    def result(self) -> OutputError:
        """Over all windows added."""
        sums = np.array(self._sums)
        count = self._rows * self._outputs
        return OutputError(
            jackknife(sums[:, :3], lambda s: cosine_of(*s)),
            jackknife(sums[:, :3], lambda s: math.sqrt(s[2] / s[0]) if s[0] > 0 else 0.0),
            float(sums[:, 2].sum()) / count,
            float(sums[:, 3].sum()) / count,
            float(sums[:, 4].max()),
            self._rows,
        )


def jackknife(sums: np.ndarray, statistic) -> Jackknifed:
    """statistic: of the sums (k,) over all windows; sums: (N, k), of each window."""
    n, total = len(sums), sums.sum(axis=0)
    value = float(statistic(total))
    if n < 2:
        return Jackknifed(value, -math.inf, math.inf, n)
    without = np.array([statistic(total - row) for row in sums])
    error = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    half = float(stdtrit(n - 1, 0.975)) * error
    return Jackknifed(value, value - half, value + half, n)


def relative_error_of(cosine: float) -> float:
    """The relative error that a cosine implies for a plain truncation, on any inputs:
    sqrt(1 - cosine^2)."""
    return math.sqrt(1 - cosine * cosine)


def cosine_of(yy: float, ye: float, ee: float) -> float:
    """Of y and z = y - e; 1 where both are zero."""
    zz = yy - 2 * ye + ee
    if yy <= 0 or zz <= 0:
        return 1.0 if yy == zz else 0.0
    return (yy - ye) / math.sqrt(yy * zz)
