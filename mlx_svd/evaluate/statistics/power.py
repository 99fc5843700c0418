"""What a number of items can show: detectable differences, and the items that a claim needs.

All at 5 % significance, two-sided (one-sided twice for equivalence), and 80 % power unless told.
Shares: the normal approximation of McNemar's test (R. J. Connor, Biometrics 43, 1987), in which
only ``discordance`` matters, the share of items on which the two runs disagree; the exact test
needs slightly more.
"""

import math

from scipy.optimize import brentq
from scipy.stats import norm

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.statistics.intervals import wilson

ALPHA, POWER = 0.05, 0.8
# Half of the width of a share's interval is widest here, and hardly less from 0.3 to 0.7.
_MIDDLE = 0.5


def items_to_detect(difference: float, discordance: float, power: float = POWER) -> int:
    """Items that show a difference of two shares as significant with probability ``power``.

    discordance: share of items that flip, at least the difference (fewer flips cannot make it).
    Raises MlxSvdError outside (0, 1].
    """
    _check("difference", difference)
    _check("discordance", discordance)
    return math.ceil(_connor(difference, max(difference, discordance), power))


def detectable_share_difference(n: int, discordance: float, power: float = POWER) -> float:
    """Smallest difference of two shares that n paired items show with probability ``power``; 1
    (nothing) if n is too small for any. discordance 0 to 1; where none was seen (0), the smallest
    one that makes a difference: the difference itself."""

    def missing(difference: float) -> float:
        return _connor(difference, max(difference, discordance), power) - n

    if missing(1.0) > 0:
        return 1.0
    return float(brentq(missing, 1e-9, 1.0))


def detectable_mean_difference(error: float, power: float = POWER) -> float:
    """Smallest difference of two means that is shown with probability ``power``, given the standard
    error of the paired difference. In the same unit."""
    return _quantiles(power) * error


def items_for_mean_difference(
    difference: float, error: float, n: int, power: float = POWER
) -> float:
    """Items that show ``difference``, if n items gave it the standard error ``error``; infinite if
    one item or none gave it."""
    if not math.isfinite(error):
        return math.inf
    return math.ceil(n * (_quantiles(power) * error / difference) ** 2)


def items_for_equivalence(margin: float, error: float, n: int, power: float = POWER) -> float:
    """Items with which two equal runs pass the equivalence test with probability ``power``, if n
    items gave their difference the standard error ``error`` (Julious, Statistics in Medicine 23,
    2004: z(0.95) + z((1 + power) / 2) standard errors must fit into the margin)."""
    if not math.isfinite(error):
        return math.inf
    needed = float(norm.ppf(1 - ALPHA) + norm.ppf((1 + power) / 2))
    return max(2, math.ceil(n * (needed * error / margin) ** 2))


def items_for_share_equivalence(margin: float, discordance: float, power: float = POWER) -> int:
    """``items_for_equivalence`` of two shares of which ``discordance`` of the items flip. Without
    flips as many as the score interval needs to become narrower than the margin."""
    z = float(norm.ppf(1 - ALPHA))
    return max(
        int(items_for_equivalence(margin, math.sqrt(discordance), 1, power)),
        math.ceil(z**2 * (1 - margin) / margin),
    )


def implied_interval(n: int, share: float = _MIDDLE) -> float:
    """Half of the width of the 95 % interval of a share that n items give: what ``--limit n``
    implies before anything is run. Raises MlxSvdError for n below 1."""
    if n < 1:
        raise MlxSvdError(f"--limit {n}: give at least one item")
    low, high = wilson(round(share * n), n)
    return (high - low) / 2


def items_for_interval(half_width: float, share: float = _MIDDLE) -> int:
    """Items that give a share a 95 % interval of plus or minus ``half_width`` or less."""
    _check("half of an interval", half_width)
    n = max(1, math.ceil(float(norm.ppf(1 - ALPHA / 2)) ** 2 * share * (1 - share) / half_width**2))
    while n > 1 and implied_interval(n - 1, share) <= half_width:
        n -= 1
    return n


def limit_note(n: int, margin: float) -> str:
    """One line for a run of n items: the interval that it implies, and how many a difference of
    ``margin`` needs if one item in ten flips; "" if n is enough for it."""
    needed = items_to_detect(margin, 0.1)
    if n >= needed:
        return ""
    half = implied_interval(n)
    return (
        f"n = {n:,}: a score has an interval of about +-{100 * half:.1f} points; a paired "
        f"difference of {100 * margin:g} points needs about {needed:,} items"
    )


def _connor(difference: float, discordance: float, power: float) -> float:
    z_alpha, z_power = float(norm.ppf(1 - ALPHA / 2)), float(norm.ppf(power))
    spread = math.sqrt(discordance - difference**2)
    return ((z_alpha * math.sqrt(discordance) + z_power * spread) / difference) ** 2


def _quantiles(power: float) -> float:
    return float(norm.ppf(1 - ALPHA / 2) + norm.ppf(power))


def _check(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise MlxSvdError(f"{name} {value}: give a share above 0, up to 1")
