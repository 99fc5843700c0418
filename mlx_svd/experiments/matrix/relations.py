"""How two metrics go together over conditions, and how a difference depends on a number."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from mlx_svd.evaluate.statistics.intervals import mean_interval
from mlx_svd.evaluate.statistics.paired import RESAMPLES
from mlx_svd.experiments.matrix.config import Interaction
from mlx_svd.experiments.matrix.record import Measured

_LEAST = 4


def correlate(
    a: str, b: str, runs: Mapping[str, Mapping[int | None, Measured]], *, seed: int = 0
) -> dict[str, Any]:
    """Spearman's rank correlation of two metrics (means over seeds) over the conditions that have
    both, with a 95 % percentile bootstrap interval over conditions and the exact or asymptotic p
    of scipy. Conditions are chosen, not drawn, so this describes these conditions."""
    points = []
    for name, found in runs.items():
        have = [m.metrics for m in found.values() if a in m.metrics and b in m.metrics]
        if have:
            points.append((name, *(np.mean([m[key].mean for m in have]) for key in (a, b))))
    entry: dict[str, Any] = {"a": a, "b": b, "conditions": [p[0] for p in points]}
    if len(points) < _LEAST:
        return entry | {"rho": None, "low": None, "high": None, "p": None}
    x, y = (np.array([p[i] for p in points]) for i in (1, 2))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return entry | {"rho": None, "low": None, "high": None, "p": None}
    found = stats.spearmanr(x, y)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(x), (RESAMPLES, len(x)))
    ranks = [stats.rankdata(v[drawn], axis=1) for v in (x, y)]
    centered = [r - r.mean(axis=1, keepdims=True) for r in ranks]
    size = np.sqrt(np.prod([np.square(c).sum(axis=1) for c in centered], axis=0))
    # A resample of one condition only has no correlation.
    rhos = (centered[0] * centered[1]).sum(axis=1)[size > 0] / size[size > 0]
    low, high = np.quantile(rhos, [0.025, 0.975])
    return entry | {
        "rho": float(found.statistic), "low": float(low), "high": float(high),
        "p": float(found.pvalue),
    }  # fmt: skip


def interact(
    interaction: Interaction, metric: str, runs: Mapping[str, Mapping[int | None, Measured]]
) -> dict[str, Any]:
    """The slope of a difference over the base model's value of the metric: in each seed a
    least-squares line through its points (x: the base; y: b minus a), then Student's t over the
    seeds, which are independent; None with fewer than two seeds or without variation of x."""
    points: dict[int | None, list[tuple[float, float]]] = {}
    for base, pair in interaction.points:
        for seed, run in runs[base].items():
            a, b = runs[pair.a].get(seed), runs[pair.b].get(seed)
            if a is None or b is None:
                continue
            y = b.metrics[metric].mean - a.metrics[metric].mean
            points.setdefault(seed, []).append((run.metrics[metric].mean, y))
    slopes = [
        float(np.polyfit(*np.array(found).T, 1)[0])
        for found in points.values()
        if len({x for x, _ in found}) > 1
    ]
    entry: dict[str, Any] = {
        "name": interaction.name, "metric": metric, "slopes": slopes,
    }  # fmt: skip
    if len(slopes) < 2:
        return entry | {"slope": None, "low": None, "high": None, "p": None}
    slope, low, high = mean_interval(slopes, np.ones(len(slopes)))
    p = float(stats.ttest_1samp(slopes, 0).pvalue) if np.ptp(slopes) else 1.0
    return entry | {"slope": slope, "low": low, "high": high, "p": p}
