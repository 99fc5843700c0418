"""One line of a comparison: a metric of two runs, its difference, and what that shows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_svd.evaluate.statistics.intervals import Estimate, chance_mark, estimate_of_sums
from mlx_svd.evaluate.statistics.paired import (
    Difference,
    Equivalence,
    Flips,
    equivalence,
    flips,
    holm,
    is_binary,
    mean_equivalence,
    paired_difference,
)
from mlx_svd.evaluate.statistics.pairing import Paired
from mlx_svd.evaluate.statistics.power import (
    ALPHA,
    detectable_mean_difference,
    detectable_share_difference,
    items_for_equivalence,
    items_for_share_equivalence,
)

# Verdicts, the first that holds.
AT_CHANCE, EQUIVALENT, BETTER, WORSE = "chance", "equivalent", "better", "worse"
NO_DEGRADATION, NOT_SHOWN = "no degradation", "not shown"


@dataclass(frozen=True)
class MetricComparison:
    """a, b: values with standard error and 95 % interval; mark_a, mark_b: what they say against
    chance; more_is_better: None if neither is; difference: b - a, paired; p_holm: its p adjusted
    for all lines with a verdict; flips: of right and wrong answers; equivalence: to the margin,
    with low and high of b - a; detects: smallest difference that so many items show with 80 %
    power; needed: items that would show two equal runs to be equivalent; missing: items left out.

    verdict: "chance" (neither model is shown to be above guessing, so that there is nothing to
    lose: no claim, however the numbers differ), "equivalent" (within the margin), "better" or
    "worse" (significant after Holm), "no degradation" (not worse by the margin), "not shown" (too
    few items for any of these), "" for metrics without a good direction.
    """

    task: str
    metric: str
    a: Estimate
    b: Estimate
    mark_a: str
    mark_b: str
    more_is_better: bool | None
    difference: Difference
    p_holm: float | None
    flips: Flips | None
    equivalence: Equivalence | None
    verdict: str
    detects: float
    needed: float | None
    missing: int


def compare_metric(
    task: str,
    pair: Paired,
    more_is_better: bool | None,
    margin: float,
    chance: float | None = None,
    seed: int = 0,
) -> MetricComparison:
    """Compare one metric item by item. chance: level of guessing, if there is one; seed: of the
    bootstrap. Without p_holm and verdict: ``judged`` needs all lines."""
    a, b = (estimate_of_sums(sums, pair.counts) for sums in (pair.sums_a, pair.sums_b))
    mark_a, mark_b = ("" if chance is None else chance_mark(score, chance) for score in (a, b))
    difference = paired_difference(pair.sums_a, pair.sums_b, pair.counts, seed=seed)
    binary = is_binary(pair.sums_a, pair.sums_b, pair.counts)
    flipped = flips(pair.sums_a, pair.sums_b) if binary else None
    equal = needed = None
    if flipped is None:
        detects = detectable_mean_difference(difference.error)
    else:
        detects = detectable_share_difference(flipped.n, flipped.discordance)
    if more_is_better is not None:
        equal = _equivalence(pair, more_is_better, margin)
        if flipped is None:
            needed = items_for_equivalence(margin, difference.error, difference.n)
        else:
            needed = items_for_share_equivalence(margin, flipped.discordance)
    return MetricComparison(
        task, pair.name, a, b, mark_a, mark_b, more_is_better, difference, difference.p, flipped,
        equal, "", detects, needed, pair.missing,
    )  # fmt: skip


def compare_estimates(
    task: str, name: str, a: Estimate, b: Estimate, difference: Difference, margin: float
) -> MetricComparison:
    """A line about numbers that belong to no item (distinct-n), of which more is better."""
    d = difference
    equal = mean_equivalence(d.value, d.error, d.n, margin)
    needed = items_for_equivalence(margin, d.error, d.n)
    detects = detectable_mean_difference(d.error)
    return MetricComparison(
        task, name, a, b, "", "", True, d, d.p, None, equal, "", detects, needed, 0
    )


def judged(rows: Sequence[MetricComparison]) -> list[MetricComparison]:
    """The lines with Holm's correction over all that get a verdict, and these verdicts.

    Equivalence needs no correction: claiming it for all lines is wrong only if it is wrong for one.
    """
    adjusted = iter(holm([row.difference.p for row in rows if row.more_is_better is not None]))
    found = []
    for row in rows:
        p = None if row.more_is_better is None else next(adjusted)
        found.append(replace(row, p_holm=p, verdict="" if p is None else _verdict(row, p)))
    return found


def _verdict(row: MetricComparison, p_holm: float) -> str:
    if row.mark_a and row.mark_b:
        return AT_CHANCE
    if row.equivalence.p < ALPHA:
        return EQUIVALENT
    if p_holm < ALPHA:
        return BETTER if (row.difference.value > 0) == row.more_is_better else WORSE
    return NO_DEGRADATION if row.equivalence.p_low < ALPHA else NOT_SHOWN


def _equivalence(pair: Paired, more_is_better: bool, margin: float) -> Equivalence:
    """p_low is of "worse", whichever direction that is; low and high are of b - a."""
    if more_is_better:
        return equivalence(pair.sums_a, pair.sums_b, pair.counts, margin)
    # Runs exchanged, not signs: right and wrong must stay 0 and 1.
    found = equivalence(pair.sums_b, pair.sums_a, pair.counts, margin)
    return replace(found, low=-found.high, high=-found.low)
