"""Confidence intervals: of a mean over windows of text, and of a share."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

# 0.975 quantile of the normal distribution.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Share:
    """share = count / n; low, high: its 95 % interval after Wilson."""

    share: float
    low: float
    high: float
    count: int
    n: int


def share_of(flags: np.ndarray) -> Share:
    """Share of true values in a boolean array (n,); ``wilson`` gives the interval."""
    count, n = int(np.count_nonzero(flags)), len(flags)
    return Share(count / n if n else math.nan, *wilson(count, n), count, n)


def wilson(count: int, n: int) -> tuple[float, float]:
    """95 % interval of ``count`` successes in ``n`` independent trials (E. B. Wilson, JASA 22,
    1927). Unlike the normal interval it is never empty at 0 or n; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = count / n, _Z**2
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends the bound is exact; rounding must not move it past the share itself.
    low = 0.0 if count == 0 else max(0.0, center - half)
    return low, 1.0 if count == n else min(1.0, center + half)


def mean_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high): sum(sums) / sum(counts) with a 95 % interval.

    sums (N,): of some quantity over the tokens of each window; counts (N,): tokens per window.
    Tokens of one window depend on each other, so the interval comes from the variation between
    windows: the linearized variance of a ratio (Cochran, Sampling Techniques, ch. 6) and
    Student's t with N - 1 degrees of freedom. One window says nothing about its variation: the
    interval is then infinite.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    n, total = len(sums), counts.sum()
    mean = float(sums.sum() / total)
    if n < 2:
        return mean, -math.inf, math.inf
    residuals = sums - mean * counts
    error = math.sqrt(n / (n - 1) * float(residuals @ residuals)) / total
    half = float(stdtrit(n - 1, 0.975)) * error
    return mean, mean - half, mean + half
