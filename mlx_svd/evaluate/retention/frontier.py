"""Runs compared where they learned equally much: retention as a function of uptake.

A run is measured at several steps: a trajectory of points (uptake, retention). Arms that
learn at different speeds are at different places of it after the same steps, and one that learned
nothing retains everything. So a run is read off at a given uptake: where it first reaches
that, each fact's outcome is interpolated between the two points around it. Two runs with the same
facts are then compared fact by fact.
"""

from collections.abc import Sequence

import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.statistics.paired import Difference, paired_difference


def at_uptake(uptakes: Sequence[float], values: np.ndarray, level: float) -> np.ndarray | None:
    """Outcomes where a run first reaches an uptake.

    uptakes (P,): of the run's points, in the order of steps; values (P, n): any outcome of n items
    at each; level: above 0, up to 1. Returns (n,) float64, linear between the points around the
    first crossing (a point that has exactly this uptake is taken as it is), None if the run never
    reached it. Raises MlxSvdError if the numbers of points differ or the run begins above the
    level, where nothing can be read off.
    """
    uptakes = np.asarray(uptakes, dtype=np.float64)
    values = np.asarray(values, dtype=np.float64)
    if len(uptakes) != len(values) or not len(uptakes):
        raise MlxSvdError(
            f"{len(uptakes)} uptakes for {len(values)} points of a run; give one for each"
        )
    reached = np.flatnonzero(uptakes >= level)
    if not len(reached):
        return None
    after = int(reached[0])
    if uptakes[after] == level:
        return values[after].copy()
    if after == 0:
        raise MlxSvdError(
            f"uptake {level:g}: the run begins at {uptakes[0]:g} already; compare at a higher one"
        )
    share = (level - uptakes[after - 1]) / (uptakes[after] - uptakes[after - 1])
    return values[after - 1] + share * (values[after] - values[after - 1])


def retained_at_uptake(
    uptakes: Sequence[float], margins: np.ndarray, measured: np.ndarray, level: float
) -> np.ndarray | None:
    """Of each measured fact, how far it is still known (0 to 1) where the run reaches ``level``.

    margins (P, n): of all facts at each point, above 0 where known; measured (n,) bool. The mean is
    retention at that uptake.
    """
    return at_uptake(uptakes, np.asarray(margins)[:, np.asarray(measured)] > 0, level)


def difference_at_uptake(
    uptakes_a: Sequence[float],
    margins_a: np.ndarray,
    uptakes_b: Sequence[float],
    margins_b: np.ndarray,
    measured: np.ndarray,
    level: float,
    *,
    seed: int = 0,
) -> Difference | None:
    """Retention of run b minus that of run a where both reach ``level``, paired by fact (BCa
    bootstrap over facts); None if one of them never does. Arguments as of
    :func:`retained_at_uptake`, of two runs of one knowledge test. The interval is for these facts
    and this seed: that uptake itself was measured on a sample, and that another seed trains in
    another order, is not in it.
    """
    a = retained_at_uptake(uptakes_a, margins_a, measured, level)
    b = retained_at_uptake(uptakes_b, margins_b, measured, level)
    if a is None or b is None:
        return None
    return paired_difference(a, b, np.ones(len(a)), seed=seed)


def uptake_reached(uptakes: Sequence[Sequence[float]]) -> float:
    """The highest uptake that every one of these runs reached: where they can all be compared."""
    if not len(uptakes):
        raise MlxSvdError("no runs were given to compare")
    return min(max(points) for points in uptakes)
