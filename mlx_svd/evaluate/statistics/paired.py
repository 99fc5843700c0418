"""Two runs on the same items: the difference with its interval, its test, its equivalence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.statistics.intervals import ratio_error
from mlx_svd.evaluate.statistics.matched_shares import share_difference_interval, share_difference_p

# Resamples of the bootstrap and of the sign-flip test.
RESAMPLES = 9999
# Numbers held at once while resampling: 32 MB.
_HELD = 1 << 22


@dataclass(frozen=True)
class Difference:
    """b - a on the same items. value: mean difference; error: its standard error; low, high: its
    95 % interval; bootstrap: the BCa bootstrap's, where there is one; p: that the two do not differ
    (two-sided); method, test: which interval low and high are, and which test p is; n: items."""

    value: float
    error: float
    low: float
    high: float
    bootstrap: tuple[float, float] | None
    p: float
    method: str
    test: str
    n: int


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests at 5 % against a margin (TOST; Schuirmann 1987). p_low: that b is worse
    than a by the margin or more; p_high: that it is better by the margin or more; p: the larger
    one, small if the two are equivalent; low, high: the 90 % interval of the difference."""

    margin: float
    p_low: float
    p_high: float
    low: float
    high: float

    @property
    def p(self) -> float:
        """p of the equivalence."""
        return max(self.p_low, self.p_high)


@dataclass(frozen=True)
class Flips:
    """Items on which a and b disagree: lost (right in a, wrong in b), gained (the reverse), of n
    items; flips are quality that the difference of two scores hides (arXiv 2407.09141)."""

    lost: int
    gained: int
    n: int

    @property
    def discordance(self) -> float:
        """Share of the items that flipped, either way."""
        return (self.lost + self.gained) / self.n


def flips(a: np.ndarray, b: np.ndarray) -> Flips:
    """Flips between a and b (n,), right (1) or wrong (0) on the same items in the same order."""
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    return Flips(int((a & ~b).sum()), int((~a & b).sum()), len(a))


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p that flips go either way equally often (McNemar 1947): the binomial test
    of lost against gained at 1/2. 1 without flips."""
    if lost + gained == 0:
        return 1.0
    return float(stats.binomtest(lost, lost + gained, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for being one of several (Holm 1979), in the order given: below 0.05 only
    where the chance of even one false claim among all of them is below 5 %."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = np.empty(len(p_values)), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted.tolist()


def bootstrap_interval(
    sums: np.ndarray, counts: np.ndarray, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """BCa interval (Efron 1987) of sum(sums) / sum(counts), from resampled items.

    sums (N,): differences summed over the rows of each item; counts (N,): rows of each item, or
    tokens. Whole items are drawn, so rows of one item stay together. Where all items agree the
    interval is that one value, which claims more than the data say; for right and wrong see
    ``share_difference_interval``.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return -math.inf, math.inf
    if np.ptp(sums / counts) == 0:
        return value, value
    result = stats.bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis) / c.sum(axis),
        n_resamples=RESAMPLES,
        batch=max(1, _HELD // len(sums)),
        paired=True,
        vectorized=True,
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high)


def sign_flip_test(sums: np.ndarray, *, seed: int = 0) -> float:
    """Two-sided p that the differences sums (N,) of N items have either sign equally often: the
    paired randomization test (Fisher 1935), of which McNemar's is the case of right and wrong.
    Exact up to 13 items, then from 9,999 random flips, so never below 2 / 10,000."""
    sums = np.asarray(sums, dtype=np.float64)
    if len(sums) < 2 or not sums.any():
        return 1.0
    result = stats.permutation_test(
        (sums,),
        lambda x, axis: x.sum(axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=max(1, _HELD // len(sums)),
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def paired_difference(
    sums_a: np.ndarray, sums_b: np.ndarray, counts: np.ndarray, *, seed: int = 0
) -> Difference:
    """Mean of b minus mean of a, per row (or token), over the same N items.

    sums_a, sums_b (N,): of the metric over the rows of each item; counts (N,): rows of each item,
    the same in both. Right and wrong (0 and 1) with one row an item: Tango's score interval and
    McNemar's exact test; else the BCa bootstrap over items and the sign-flip test. The seed is
    that of the resampling. Raises MlxSvdError for no items.
    """
    a, b, counts = (np.asarray(x, dtype=np.float64) for x in (sums_a, sums_b, counts))
    if not len(a) or not len(a) == len(b) == len(counts):
        raise MlxSvdError(
            f"a paired difference of {len(a)} and {len(b)} items; give the same items of both, "
            "at least one"
        )
    value, error = ratio_error(b - a, counts)
    bootstrap = bootstrap_interval(b - a, counts, seed=seed)
    if is_binary(a, b, counts):
        f = flips(a, b)
        interval = share_difference_interval(f.lost, f.gained, f.n)
        p = mcnemar(f.lost, f.gained)
        return Difference(value, error, *interval, bootstrap, p, "score", "McNemar", len(a))
    p = sign_flip_test(b - a, seed=seed)
    return Difference(value, error, *bootstrap, bootstrap, p, "bootstrap", "sign flip", len(a))


def jackknife_difference(value: float, parts: np.ndarray) -> Difference:
    """A difference of two numbers that are no means, from the differences ``parts`` (N,) of their
    jackknife pseudo-values on the same items: Student's t on these (Tukey 1958)."""
    parts = np.asarray(parts, dtype=np.float64)
    n = len(parts)
    _, error = ratio_error(parts, np.ones(n))
    if n < 2 or error == 0:
        width, p = (math.inf, 1.0) if n < 2 else (0.0, float(value == 0))
    else:
        t = stats.t(n - 1)
        width, p = float(t.ppf(0.975)) * error, 2 * float(t.sf(abs(value) / error))
    return Difference(value, error, value - width, value + width, None, p, "jackknife", "t", n)


def equivalence(
    sums_a: np.ndarray, sums_b: np.ndarray, counts: np.ndarray, margin: float
) -> Equivalence:
    """Whether b is within ``margin`` (in the metric's own unit) of a; arguments as of
    ``paired_difference``. Tests: Tango's score test for right and wrong, else Student's t on the
    clustered standard error. Raises MlxSvdError for a margin that is not positive."""
    if not margin > 0 or not math.isfinite(margin):
        raise MlxSvdError(f"margin {margin}: give a positive number, as 0.01 for one point")
    a, b, counts = (np.asarray(x, dtype=np.float64) for x in (sums_a, sums_b, counts))
    if is_binary(a, b, counts):
        f = flips(a, b)
        low, high = share_difference_interval(f.lost, f.gained, f.n, level=0.9)
        p_low = share_difference_p(f.lost, f.gained, f.n, -margin)
        p_high = share_difference_p(f.gained, f.lost, f.n, -margin)
        return Equivalence(margin, p_low, p_high, low, high)
    return mean_equivalence(*ratio_error(b - a, counts), len(a), margin)


def mean_equivalence(value: float, error: float, n: int, margin: float) -> Equivalence:
    """``equivalence`` from a difference, its standard error and the number of items."""
    if n < 2:
        return Equivalence(margin, 1.0, 1.0, -math.inf, math.inf)
    if error == 0:  # every item differs by the same amount, down to the last digit
        return Equivalence(margin, float(value <= -margin), float(value >= margin), value, value)
    t = stats.t(n - 1)
    half = float(t.ppf(0.95)) * error
    return Equivalence(
        margin,
        float(t.sf((value + margin) / error)),
        float(t.cdf((value - margin) / error)),
        value - half,
        value + half,
    )


def is_binary(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> bool:
    """Whether these are right and wrong answers (0 and 1), one row an item."""
    return bool(np.all(counts == 1) and np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
