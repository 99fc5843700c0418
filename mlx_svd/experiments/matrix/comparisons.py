"""Two conditions on the same items and seeds: difference, intervals, tests.

There are two questions, and a claim needs both: would it hold for other items (facts, windows), and
would it hold for other seeds (prompts, noise, training)? Items: the difference of each item,
summed over the seeds, so an item that several runs were asked is one unit; McNemar's exact test
for right and wrong answers of one run each, else a BCa bootstrap over items and the sign-flip test.
Seeds: the difference of the two runs of each seed, Student's t. p is the larger one of the two p
values, the test of "it fails to hold for one of the two" (intersection-union; Berger 1982).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.statistics.intervals import mean_interval, safe_exp
from mlx_svd.evaluate.statistics.paired import Difference, paired_difference
from mlx_svd.experiments.matrix.record import EXP, Measured, Metric


@dataclass(frozen=True)
class Comparison:
    """b against a. value: the difference b - a, or the ratio b / a on the scale "exp"; items_low,
    items_high: 95 % interval over items, with p_items and the name of its test; seeds_low,
    seeds_high, p_seeds: over seeds, None unless at least two seeds were run; seed_values: the
    difference (ratio) of each seed; p: the larger p; items, runs: how many items and pairs of runs;
    left_out: items that only one of the two has."""

    scale: str
    better: bool | None
    value: float
    items_low: float
    items_high: float
    p_items: float
    test: str
    seeds_low: float | None
    seeds_high: float | None
    p_seeds: float | None
    seed_values: list[float]
    p: float
    items: int
    runs: int
    left_out: int


def compare_runs(
    a: Mapping[int | None, Measured],
    b: Mapping[int | None, Measured],
    metric: str,
    metric_b: str | None = None,
) -> Comparison:
    """The metric of b (or another metric of it, of the same items) against that of a, runs by seed;
    the key None is a run in which nothing is random, which pairs with every seed
    of the other. Raises MlxSvdError if no seed was run in both, or for runs without common items.
    """
    names = (metric, metric_b or metric)
    a, b = (
        {seed: run for seed, run in runs.items() if name in run.metrics}
        for runs, name in zip((a, b), names, strict=True)
    )
    seeds = _common_seeds(a, b)
    sums_a: dict[str, float] = {}
    sums_b: dict[str, float] = {}
    counts: dict[str, float] = {}
    differences, left_out, share = [], 0, True
    first = None
    for seed in seeds:
        one, other = (
            runs.get(seed, runs.get(None)).metrics[name]
            for runs, name in zip((a, b), names, strict=True)
        )
        first = first or one
        share = share and one.share and other.share
        items, left = _common_items(one, other, metric)
        left_out = max(left_out, left)
        rows_a, rows_b = _rows(one), _rows(other)
        totals = np.zeros(3)
        for item in items:
            (value_a, weight), (value_b, weight_b) = rows_a[item], rows_b[item]
            if weight != weight_b:
                raise MlxSvdError(
                    f"{metric}: item {item!r} has {weight:g} and {weight_b:g} tokens in the two "
                    "runs; compare models of one tokenizer"
                )
            sums_a[item] = sums_a.get(item, 0.0) + value_a
            sums_b[item] = sums_b.get(item, 0.0) + value_b
            counts[item] = counts.get(item, 0.0) + weight
            totals += value_a, value_b, weight
        differences.append((totals[1] - totals[0]) / totals[2])
    sums = [np.array(list(x.values())) for x in (sums_a, sums_b, counts)]
    found = _paired_answers(*sums) if share else paired_difference(*sums)
    shown = safe_exp if first.scale == EXP else float
    low = high = p_seeds = None
    if len(seeds) > 1:
        _, low, high = mean_interval(differences, np.ones(len(seeds)))
        low, high, p_seeds = shown(low), shown(high), _t_test(differences)
    return Comparison(
        scale=first.scale,
        better=first.better,
        value=shown(found.value),
        items_low=shown(found.low),
        items_high=shown(found.high),
        p_items=found.p,
        test=found.test,
        seeds_low=low,
        seeds_high=high,
        p_seeds=p_seeds,
        seed_values=[shown(d) for d in differences],
        p=found.p if p_seeds is None else max(found.p, p_seeds),
        items=len(counts),
        runs=len(seeds),
        left_out=left_out,
    )


def _paired_answers(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> Difference:
    """Over items. Right and wrong answers that are the same in every run of an item are one answer
    an item, whose test and interval hold even without a single flip."""
    if all(one_answer(sums, counts) for sums in (a, b)):
        return paired_difference(a / counts, b / counts, np.ones(len(counts)))
    return paired_difference(a, b, counts)


def one_answer(sums: np.ndarray, counts: np.ndarray) -> bool:
    """Whether each item was right in all of its runs or in none."""
    return bool(np.isin(sums / counts, (0, 1)).all())


def _common_seeds(
    a: Mapping[int | None, Measured], b: Mapping[int | None, Measured]
) -> list[int | None]:
    if None in a or None in b:
        seeds = [s for s in (*a, *b) if s is not None]
        return list(dict.fromkeys(seeds)) or [None]
    seeds = [s for s in a if s in b]
    if not seeds:
        raise MlxSvdError("two conditions have no seed in common, so they cannot be paired")
    return seeds


def _rows(metric: Metric) -> dict[str, tuple[float, float]]:
    rows = zip(metric.values, metric.weights, strict=True)
    return dict(zip(metric.items, rows, strict=True))


def _common_items(a: Metric, b: Metric, name: str) -> tuple[list[str], int]:
    """(items of both, how many only one has)."""
    other = set(b.items)
    items = [item for item in a.items if item in other]
    if not items:
        raise MlxSvdError(
            f"{name}: two conditions have no item in common; measure both on the same"
        )
    return items, len(a.items) + len(b.items) - 2 * len(items)


def _t_test(differences: list[float]) -> float:
    """Two-sided p that the mean over seeds is 0; where all seeds agree to the last digit there is
    no variation to test against, and p is 1 for no difference and 0 otherwise."""
    if np.ptp(differences) == 0:
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0).pvalue)
