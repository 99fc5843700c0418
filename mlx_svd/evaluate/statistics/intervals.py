"""Standard errors and 95 % intervals: of a mean, of a share, of either clustered by item."""

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

from mlx_svd.errors import MlxSvdError

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


def ratio_error(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """(ratio, standard error) of sum(sums) / sum(counts) over N independent clusters.

    The linearized variance of a ratio (Cochran, Sampling Techniques, ch. 6) with the factor
    N / (N - 1). With all counts equal it is the standard error of the mean of the clusters'
    means. The error is infinite for one cluster: it says nothing about its variation.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    n, total = len(sums), counts.sum()
    mean = float(sums.sum() / total)
    if n < 2:
        return mean, math.inf
    residuals = sums - mean * counts
    return mean, math.sqrt(n / (n - 1) * float(residuals @ residuals)) / float(total)


def mean_interval(
    sums: np.ndarray, counts: np.ndarray, level: float = 0.95
) -> tuple[float, float, float]:
    """(mean, low, high): sum(sums) / sum(counts) with its interval, 95 % by default.

    sums (N,): of some quantity over the tokens of each window; counts (N,): tokens per window.
    Tokens of one window depend on each other, so the interval comes from the variation between
    windows: ``ratio_error`` and Student's t with N - 1 degrees of freedom. For one window it is
    infinite.
    """
    mean, error = ratio_error(sums, counts)
    if len(sums) < 2:
        return mean, -math.inf, math.inf
    half = float(stdtrit(len(sums) - 1, (1 + level) / 2)) * error
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Estimate:
    """value: a mean over rows; error: its standard error; low, high: its 95 % interval; n: the
    number of independent items; rows: the number of values."""

    value: float
    error: float
    low: float
    high: float
    n: int
    rows: int

    def contains(self, value: float) -> bool:
        """Whether ``value`` lies in the interval, ends included."""
        return self.low <= value <= self.high

    def exponential(self, scale: float = 1.0) -> "Estimate":
        """Of exp(scale * value), as a perplexity is of a mean loss. The bounds go over as they are;
        the standard error is that of first order (delta method)."""
        value, low, high = (safe_exp(scale * x) for x in (self.value, self.low, self.high))
        return replace(self, value=value, error=value * scale * self.error, low=low, high=high)


def estimate(
    values: np.ndarray,
    items: np.ndarray | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """Mean of values (n,), of 0 and 1 or of any numbers, with standard error and 95 % interval.

    items (n,): what each value belongs to, if one item gave several (seeds, paraphrases): values
    of one item depend on each other, so items are the independent units; bounds: of what a value
    can be, which the interval does not leave. The standard error is
    sd / sqrt(n) with n - 1 in sd (lm-eval's), clustered by item if need be. The interval is
    Wilson's for 0 and 1 with one value an item, else Student's t. Raises MlxSvdError for no
    values and for one that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise MlxSvdError("an estimate needs at least one value; none was given")
    if not np.isfinite(values).all():
        worst = int(np.argmin(np.isfinite(values)))
        raise MlxSvdError(
            f"value {worst} is {values[worst]}, not a finite number; look at what produced it"
        )
    found = estimate_of_sums(*by_item(values, items))
    low, high = bounds
    return replace(found, low=max(low, found.low), high=min(high, found.high))


def estimate_of_sums(sums: np.ndarray, counts: np.ndarray) -> Estimate:
    """``estimate`` of values that were summed by item already: sums (N,), counts (N,) of values, or
    of whatever the mean is per (tokens, bytes)."""
    found = window_estimate(sums, counts)
    if np.all(counts == 1) and np.isin(sums, (0, 1)).all():
        low, high = wilson(int(np.sum(sums)), len(sums))
        found = replace(found, low=low, high=high)
    return found


def window_estimate(
    sums: np.ndarray, counts: np.ndarray, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Estimate:
    """``mean_interval`` as an estimate; bounds: which the interval does not leave. Never Wilson's
    interval: a window in which every token is right is not one trial."""
    _, error = ratio_error(sums, counts)
    mean, low, high = mean_interval(sums, counts)
    low, high = max(bounds[0], low), min(bounds[1], high)
    return Estimate(float(mean), error, float(low), float(high), len(sums), int(np.sum(counts)))


def by_item(values: np.ndarray, items: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(sums (N,) float64, counts (N,)) of values (n,) over the N different items (n,); without
    items every value is its own. Raises MlxSvdError if they differ in number."""
    if items is None:
        return np.asarray(values, dtype=np.float64), np.ones(len(values), dtype=np.int64)
    if len(items) != len(values):
        raise MlxSvdError(
            f"{len(values)} values belong to {len(items)} items; give one item for each value"
        )
    _, index = np.unique(np.asarray(items), return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index)


def chance_mark(score: Estimate, chance: float) -> str:
    """What a score says against guessing: "" (the whole interval lies above ``chance``),
    "chance" (the interval contains it: no ability was shown) or "below chance" (the whole interval
    lies below: usually the scorer, the prompt or the model is broken)."""
    if score.contains(chance):
        return "chance"
    return "below chance" if score.high < chance else ""


def safe_exp(value: float) -> float:
    """e^value, infinite beyond float64."""
    return math.exp(value) if value < 709 else math.inf
