"""A gate that a model with good perplexity does not pass if its text gets stuck in loops."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.generation.summary import generation_differences, generation_summary
from mlx_svd.evaluate.statistics.intervals import Estimate
from mlx_svd.evaluate.statistics.paired import Difference

# How much the loop rate may rise over the base model's, as a share of all texts.
LOOP_MARGIN = 0.05
LOOPS = ("loop",)
PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"


@dataclass(frozen=True)
class GateCheck:
    """One metric. name: "metric,filter"; base, model: values with intervals; difference: model -
    base, paired by prompt; verdict: pass, fail or undecided."""

    name: str
    base: Estimate
    model: Estimate
    difference: Difference
    verdict: str


@dataclass(frozen=True)
class Gate:
    """margin: the rise that is allowed; verdict: fail if one check fails, else undecided if one is,
    else pass."""

    margin: float
    checks: list[GateCheck]

    @property
    def verdict(self) -> str:
        """The worst verdict of the checks."""
        verdicts = {check.verdict for check in self.checks}
        return next(v for v in (FAIL, UNDECIDED, PASS) if v in verdicts)

    @property
    def lines(self) -> list[str]:
        """One line for each check, saying what was measured and decided."""
        return [_line(check, self.margin) for check in self.checks]


def generation_gate(
    base: Sequence[dict[str, Any]],
    records: Sequence[dict[str, Any]],
    *,
    margin: float = LOOP_MARGIN,
    metrics: Sequence[str] = LOOPS,
    seed: int = 0,
) -> Gate:
    """Compare a model's texts with the base model's on the same prompts.

    base, records: of ``generation_quality``. metrics: loop, rep_2, rep_3 or rep_4, each checked in
    every way of generating. Fails where the value rose by more than ``margin`` and the 95 %
    interval of the rise lies above 0; passes where the interval lies below the margin; else the
    prompts are too few to tell (undecided). Small base models loop a lot when greedy, which hides
    damage there: sampled texts are checked too. Raises MlxSvdError for other metrics, a margin
    outside 0 to 1, and different prompts.
    """
    if not 0 <= margin < 1:
        raise MlxSvdError(f"gate margin {margin}: give a share from 0 up to 1, as 0.05")
    allowed = {"loop", "rep_2", "rep_3", "rep_4"}
    if not metrics or not set(metrics) <= allowed:
        raise MlxSvdError(
            f"--gate-metrics {','.join(metrics)}: give some of {', '.join(sorted(allowed))}"
        )
    differences = generation_differences(base, records, seed=seed)
    before, after = generation_summary(base), generation_summary(records)
    checks = [
        GateCheck(name, before[name], after[name], difference, _verdict(difference, margin))
        for name, difference in differences.items()
        if name.split(",")[0] in metrics
    ]
    if not checks:
        raise MlxSvdError(
            f"gate: no text is long enough for {', '.join(metrics)}; generate more tokens"
        )
    return Gate(margin, checks)


def _verdict(difference: Difference, margin: float) -> str:
    if difference.value > margin and difference.low > 0:
        return FAIL
    return PASS if difference.high <= margin else UNDECIDED


def _line(check: GateCheck, margin: float) -> str:
    metric, kind = check.name.split(",")
    d = check.difference
    said = {
        PASS: f"within the margin of {margin:g}",
        FAIL: f"rose by more than the margin of {margin:g}",
        UNDECIDED: f"{d.n} prompts are too few to tell whether it stays within {margin:g}",
    }[check.verdict]
    return (
        f"{check.verdict}: {metric}, {kind}: {check.base.value:.3f} -> {check.model.value:.3f}, "
        f"difference {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]; {said}"
    )
