"""Records of generated texts -> numbers with intervals, alone or paired with a base model's."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from mlx_svd.evaluate.generation.repetition import distinct
from mlx_svd.evaluate.statistics.intervals import (
    Estimate,
    by_item,
    estimate,
    ratio_error,
    window_estimate,
)
from mlx_svd.evaluate.statistics.paired import Difference, jackknife_difference, paired_difference
from mlx_svd.evaluate.statistics.pairing import check_same_items, item_id, pair_metric

# Of each text, and whether more of it is better; None: neither.
QUALITY_METRICS: dict[str, bool | None] = {
    "rep_2": False,
    "rep_3": False,
    "rep_4": False,
    "loop": False,
    "length": None,
    "ended": None,
}
# Of all texts together.
DISTINCT = (1, 2, 3)

Record = dict[str, Any]


def generation_summary(records: Sequence[Record]) -> dict[str, Estimate]:
    """ "metric,filter" -> value, standard error, 95 % interval over prompts.

    rep_2, rep_3, rep_4: mean of rep-n over the texts that have n tokens; loop: share of texts that
    end in a loop; length: mean length in tokens; ended: share ended by the end token; distinct_1,
    distinct_2, distinct_3: of all texts together, with a jackknife interval over prompts. Left out:
    a metric that no text is long enough for.
    """
    summary = {}
    for kind, rows in _by_filter(records).items():
        for metric in QUALITY_METRICS:
            have = [row for row in rows if row[metric] is not None]
            if have:
                values = np.array([row[metric] for row in have], dtype=np.float64)
                items = np.array([item_id(row) for row in have])
                if metric in ("loop", "ended"):
                    found = estimate(values, items)
                else:
                    bounds = (0, math.inf) if metric == "length" else (0, 1)
                    found = window_estimate(*by_item(values, items), bounds)
                summary[f"{metric},{kind}"] = found
    return summary | distinct_estimates(records)


def distinct_estimates(records: Sequence[Record]) -> dict[str, Estimate]:
    """The part of ``generation_summary`` that belongs to all texts together."""
    return {
        f"distinct_{n},{kind}": _distinct_estimate(rows, n)
        for kind, rows in _by_filter(records).items()
        for n in DISTINCT
        if _long_enough(rows, n)
    }


def generation_differences(
    base: Sequence[Record], records: Sequence[Record], *, seed: int = 0
) -> dict[str, Difference]:
    """ "metric,filter" -> difference to the base model on the same prompts and seeds, paired by
    prompt; metrics as in ``generation_summary``. A text shorter than n tokens in either run is left
    out of rep-n. Raises MlxSvdError if the prompts differ, naming the first."""
    check_same_items("generation", base, records)
    found = {}
    others = _by_filter(records)
    for kind, rows in _by_filter(base).items():
        for metric in QUALITY_METRICS:
            pair = pair_metric("generation", f"{metric},{kind}", metric, rows, others[kind])
            if pair is not None:
                found[pair.name] = paired_difference(
                    pair.sums_a, pair.sums_b, pair.counts, seed=seed
                )
    return found | distinct_differences(base, records)


def distinct_differences(
    base: Sequence[Record], records: Sequence[Record]
) -> dict[str, Difference]:
    """The part of ``generation_differences`` that belongs to all texts together; the records must
    have the same items."""
    found, others = {}, _by_filter(records)
    for kind, rows in _by_filter(base).items():
        for n in DISTINCT:
            if _long_enough(rows, n) and _long_enough(others[kind], n):
                a, b = (_distinct(run, n) for run in (rows, others[kind]))
                found[f"distinct_{n},{kind}"] = jackknife_difference(
                    b.value - a.value, b.parts - a.parts
                )
    return found


def _distinct_estimate(rows: Sequence[Record], n: int) -> Estimate:
    found = _distinct(rows, n)
    size = len(found.parts)
    _, error = ratio_error(found.parts, np.ones(size))
    half = float(stdtrit(size - 1, 0.975)) * error if size > 1 else math.inf
    low, high = max(0.0, found.value - half), min(1.0, found.value + half)
    return Estimate(found.value, error, low, high, size, len(rows))


def _distinct(rows: Sequence[Record], n: int):
    return distinct([row["tokens"] for row in rows], n, [item_id(row) for row in rows])


def _long_enough(rows: Sequence[Record], n: int) -> bool:
    return any(len(row["tokens"]) >= n for row in rows)


def _by_filter(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["filter"], []).append(record)
    return found
