"""Cliff or slope: does the damage set in at one point, or grow evenly?

Damage y = log KL is fitted over x by a straight line and by a broken stick, two straight lines that
meet at a break (Muggeo, Statistics in Medicine 22, 2003; least squares, the break searched over a
grid). For small errors KL is of second order in the error of the weights, so over
x = log(energy discarded) an even growth is a straight line of slope 1: a slope alone is no cliff.
Text windows are resampled for the intervals. With k = (slope after the break) / (slope before):

- "cliff": the interval of k lies above ``FACTOR``: beyond the break KL grows with at least twice
  the power of the energy discarded;
- "slope": it lies below, so there is no such break;
- "undecided": it contains ``FACTOR``.
"""

from dataclasses import dataclass

import numpy as np

from mlx_svd.errors import MlxSvdError

# How much steeper the damage must grow beyond the break to be called a cliff.
FACTOR = 2.0
_BREAKS, _RESAMPLES = 60, 2000
# Points on each side of a break at least.
_SIDE = 3


@dataclass(frozen=True)
class Bounded:
    """value with its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ChangePoint:
    """slope: of the straight line; before, after: of the broken stick, in the direction of growing
    x; break_x: where it breaks; factor: after / before; rms_line, rms_broken: residuals of the fits
    in natural logarithms; verdict: cliff, slope or undecided; points, windows: how many."""

    slope: Bounded
    before: Bounded
    after: Bounded
    break_x: Bounded
    factor: Bounded
    rms_line: float
    rms_broken: float
    verdict: str
    points: int
    windows: int


def change_point(x: np.ndarray, damage: np.ndarray, *, seed: int = 0) -> ChangePoint:
    """x (K,): how much was cut, growing; damage (K, N): KL of each point on each window, > 0 in the
    mean over windows. Raises MlxSvdError for too few points, or a mean that is not positive."""
    x, damage = np.asarray(x, dtype=np.float64), np.asarray(damage, dtype=np.float64)
    if len(x) < 2 * _SIDE + 2 or (np.diff(x) <= 0).any():
        raise MlxSvdError(
            f"change point: {len(x)} points; give at least {2 * _SIDE + 2} ranks below full rank, "
            "each cutting more than the one before"
        )
    if (damage.mean(axis=1) <= 0).any():
        raise MlxSvdError(
            "change point: a point has no measurable KL divergence; leave out ranks so near to "
            "full rank"
        )
    windows = damage.shape[1]
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, windows, (_RESAMPLES, windows))
    means = np.concatenate([damage.mean(axis=1)[None], damage[:, drawn].mean(axis=2).T])
    # A resample of windows without damage has no logarithm; its windows' floor is the smallest > 0.
    floor = means[means > 0].min()
    y = np.log(np.maximum(means, floor))
    line, rms_line = _line(x, y)
    breaks, before, after, rms_broken = _broken(x, y)
    factor = np.where(np.abs(before) > 1e-9, after / before, np.inf * np.sign(after))
    bounded = _bounded(factor)
    verdict = "undecided"
    if bounded.low > FACTOR:
        verdict = "cliff"
    elif bounded.high < FACTOR:
        verdict = "slope"
    return ChangePoint(
        _bounded(line), _bounded(before), _bounded(after), _bounded(breaks), bounded,
        float(rms_line[0]), float(rms_broken[0]), verdict, len(x), windows,
    )  # fmt: skip


def _bounded(values: np.ndarray) -> Bounded:
    """The first value is the estimate, the others are resampled."""
    low, high = np.quantile(values[1:], (0.025, 0.975), method="nearest")
    return Bounded(float(values[0]), float(low), float(high))


def _fit(design: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of every row of y (R, K): (coefficients (R, c), root mean square residual)."""
    coefficients = np.linalg.lstsq(design, y.T, rcond=None)[0]
    residuals = y.T - design @ coefficients
    return coefficients.T, np.sqrt((residuals**2).mean(axis=0))


def _line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    coefficients, rms = _fit(np.stack([np.ones_like(x), x], axis=1), y)
    return coefficients[:, 1], rms


def _broken(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """(break, slope before, slope after, residual) of every row of y."""
    best = np.full(len(y), np.inf)
    found = np.zeros((len(y), 3))
    for at in np.linspace(x[_SIDE - 1], x[-_SIDE], _BREAKS):
        design = np.stack([np.ones_like(x), x, np.maximum(x - at, 0.0)], axis=1)
        coefficients, rms = _fit(design, y)
        better = rms < best
        best = np.where(better, rms, best)
        slope, extra = coefficients[:, 1], coefficients[:, 2]
        new = np.stack([np.full(len(y), at), slope, slope + extra], axis=1)
        found = np.where(better[:, None], new, found)
    return found[:, 0], found[:, 1], found[:, 2], best
