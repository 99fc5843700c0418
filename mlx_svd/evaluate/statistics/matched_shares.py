"""The difference of two shares on the same items, by the score method, valid without any flips.

T. Tango, Equivalence test and confidence interval for the difference in proportions for the
paired-sample design, Statistics in Medicine 17, 1998. Resampling items cannot produce a flip that
did not happen, so with few flips a bootstrap interval is too narrow, and empty with none; this one
is +-z^2 / (n + z^2) there.
"""

import math

from scipy.optimize import brentq
from scipy.stats import norm


def share_difference_score(lost: int, gained: int, n: int, difference: float) -> float:
    """Tango's score statistic, standard normal if the true gain is ``difference`` (-1 to 1):
    positive where more was gained. ``lost`` and ``gained`` of n items flipped.

    The share of losses is replaced by its likeliest value under that difference, the larger root
    of 2 n q^2 + (-lost - gained + (2 n - gained + lost) difference) q - lost difference
    (1 - difference) in q, with difference measured as gained - lost.
    """
    linear = -(lost + gained) + (2 * n - gained + lost) * difference
    constant = -lost * difference * (1 - difference)
    root = (math.sqrt(max(0.0, linear**2 - 8 * n * constant)) - linear) / (4 * n)
    variance = n * (2 * root + difference * (1 - difference))
    excess = gained - lost - n * difference
    if variance <= 0:
        return 0.0 if excess == 0 else math.copysign(math.inf, excess)
    return excess / math.sqrt(variance)


def share_difference_interval(
    lost: int, gained: int, n: int, level: float = 0.95
) -> tuple[float, float]:
    """Interval of (gained - lost) / n: all differences that the score test does not reject."""
    z = float(norm.ppf((1 + level) / 2))
    value = (gained - lost) / n

    def end(side: int) -> float:
        """The difference between value and the extreme at which the statistic is -side * z."""

        def beyond(difference: float) -> float:
            return share_difference_score(lost, gained, n, difference) + side * z

        edge = float(side)
        # Right at the extreme every item must flip; the statistic is infinite or 0 there.
        inner = edge * (1 - 1e-12)
        if value == edge or beyond(inner) * side > 0:
            return edge
        return float(brentq(beyond, value, inner, xtol=1e-12))

    return end(-1), end(1)


def share_difference_p(lost: int, gained: int, n: int, difference: float) -> float:
    """One-sided p that the true gain is ``difference`` or less."""
    return float(norm.sf(share_difference_score(lost, gained, n, difference)))
