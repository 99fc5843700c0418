"""Compare two evaluated models on the same items: what differs, what is equal, what is unknown."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.comparison.metric_comparison import (
    MetricComparison,
    compare_estimates,
    compare_metric,
    judged,
)
from mlx_svd.evaluate.comparison.sample_metrics import Metric, row_metrics
from mlx_svd.evaluate.comparison.samples import Run, read_run
from mlx_svd.evaluate.generation.gate import LOOP_MARGIN, LOOPS, Gate, generation_gate
from mlx_svd.evaluate.generation.summary import distinct_differences, distinct_estimates
from mlx_svd.evaluate.statistics.pairing import Row, check_same_items, pair_metric

MARGIN = 0.01
# Of a run with --base: comparisons themselves, which the base has not.
_RELATIVE = {"flip", "retained"}


@dataclass(frozen=True)
class Comparison:
    """a, b: names of the models; margin: of equivalence; rows; gate: on loops, if both runs
    generated text; notes: what was not compared, and why."""

    a: str
    b: str
    margin: float
    rows: list[MetricComparison]
    gate: Gate | None
    notes: list[str]

    def record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        found = asdict(self)
        if self.gate is not None:
            found["gate"] = {
                "verdict": self.gate.verdict,
                "lines": self.gate.lines,
                **found["gate"],
            }
        return found


def compare(
    folder_a: str | Path,
    folder_b: str | Path,
    *,
    margin: float = MARGIN,
    metrics: Sequence[str] | None = None,
    gate_margin: float = LOOP_MARGIN,
    gate_metrics: Sequence[str] = LOOPS,
    seed: int = 0,
) -> Comparison:
    """Compare the run in folder B with the one in folder A (the base) on their common tasks.

    margin: what counts as equal, in the metric's unit (0.01: one point of a share, 1 % of a
    perplexity). metrics: only these, chosen beforehand, so that there are fewer tests to correct
    for. gate_margin: rise that is allowed of gate_metrics, the loop rate or rep-n of generated
    texts. seed: of resampling. Raises MlxSvdError for folders without results, without common tasks
    or the metrics asked for, and for runs on different data, items, numbers of examples or task
    versions, naming what differs.
    """
    a, b = read_run(folder_a), read_run(folder_b)
    common = [task for task in a.tasks if task in b.tasks]
    if not common:
        raise MlxSvdError(
            f"{a.folder} and {b.folder} have no task in common ({', '.join(a.tasks)} and "
            f"{', '.join(b.tasks)}); evaluate both on the same tasks"
        )
    notes = [*a.notes, *b.notes, *_other_settings(a, b, common)]
    for run, other, name in ((a, b, "A"), (b, a, "B")):
        if only := sorted(run.tasks.keys() - other.tasks.keys()):
            notes.append(f"not compared, only in {name}: {', '.join(only)}")
    for task in sorted(_scored(a) & _scored(b) - a.tasks.keys() - b.tasks.keys()):
        notes.append(f"{task}: not compared, it has no items of its own")
    rows: list[MetricComparison] = []
    for task in common:
        _check_conditions(a, b, task)
        rows += _task_rows(a, b, task, margin, metrics, seed, notes)
    found = {row.metric.split(",")[0] for row in rows}
    lacking = [name for name in metrics or () if name not in found]
    if lacking or not rows:
        remedy = "leave out --metrics to see all" if metrics else "evaluate both again"
        raise MlxSvdError(
            f"{a.folder} and {b.folder} have no metric {', '.join(lacking)} in common for the "
            f"items of {', '.join(common)}; {remedy}"
        )
    gate = _gate(a, b, gate_margin, gate_metrics, seed)
    return Comparison(a.model, b.model, margin, judged(rows), gate, notes)


def _scored(run: Run) -> set[str]:
    found = run.results.get("results")
    return set(found) if isinstance(found, dict) else set()


def _other_settings(a: Run, b: Run, tasks: Sequence[str]) -> list[str]:
    """Settings that may differ between models but change what a difference means."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        for key in ("max_length", "scoring"):
            one, other = (_setting(run, task, key) for run in (a, b))
            if one != other:
                found.setdefault(f"{key}: {one} in A, {other} in B", []).append(task)
    notes = [
        text if len(of) == len(tasks) else f"{text} ({', '.join(of)})" for text, of in found.items()
    ]
    one, other = (run.condition("model_dtype") for run in (a, b))
    return [*notes, *([f"dtype: {one} in A, {other} in B"] if one != other else [])]


def _setting(run: Run, task: str, key: str) -> Any:
    """The length in effect, where a run says it: without the option it is the model's."""
    in_effect = run.setting(task, "context") if key == "max_length" else None
    return in_effect or run.setting(task, key)


def _check_conditions(a: Run, b: Run, task: str) -> None:
    check_same_items(task, a.tasks[task], b.tasks[task])
    for key, what in (("n-shot", "number of examples"), ("versions", "version of the task")):
        one, other = a.of_task(key, task), b.of_task(key, task)
        if one is not None and other is not None and one != other:
            raise MlxSvdError(
                f"{task}: the {what} differs: {one} in A, {other} in B; evaluate both alike"
            )
    if a.of_task("n-shot", task):
        one, other = a.setting(task, "seed"), b.setting(task, "seed")
        if one != other:
            raise MlxSvdError(
                f"{task}: the seed of the examples differs: {one} in A, {other} in B; evaluate "
                "both alike"
            )
    one, other = a.data_hash(task), b.data_hash(task)
    if one is not None and other is not None and one != other:
        raise MlxSvdError(
            f"{task}: the data differ: hash {one[:12]} in A, {other[:12]} in B; evaluate both on "
            "the same data"
        )


def _task_rows(
    a: Run,
    b: Run,
    task: str,
    margin: float,
    wanted: Sequence[str] | None,
    seed: int,
    notes: list[str],
) -> list[MetricComparison]:
    (found, skipped), (others, _) = row_metrics(a, task), row_metrics(b, task)
    if skipped:
        notes.append(f"{task}: not compared, no number per item: {', '.join(skipped)}")
    only = {m.name for m in found} ^ {m.name for m in others}
    found = [metric for metric in found if metric.name not in only]
    if only - _RELATIVE:
        notes.append(
            f"{task}: not compared, only in one run: {', '.join(sorted(only - _RELATIVE))}"
        )
    rows = []
    for metric in found:
        if wanted is not None and metric.name not in wanted:
            continue
        for kind, rows_a, rows_b in _filters(a.tasks[task], b.tasks[task]):
            if metric.name == "nats/token" and _other_tokens(rows_a, rows_b, metric):
                notes.append(f"{task}: nats/token not compared: the models tokenize differently")
                continue
            name = f"{metric.name},{kind}" if kind else metric.name
            pair = pair_metric(task, name, metric.field, rows_a, rows_b, metric.weight)
            if pair is None:
                notes.append(f"{task}: {name} not compared: no item has a value in both")
                continue
            level = a.chance(task, metric.name)
            rows.append(compare_metric(task, pair, metric.better, margin, level, seed))
            if pair.missing:
                notes.append(f"{task}: {name}: items left out, without a value: {pair.missing}")
    if _generated(a, b, task):
        rows += _distinct_rows(task, a.tasks[task], b.tasks[task], margin, wanted)
    return rows


def _filters(a: list[Row], b: list[Row]) -> list[tuple[str, list[Row], list[Row]]]:
    """(name shown, rows of A, rows of B) of each filter; the only one needs no name."""
    kinds = list(dict.fromkeys(row.get("filter", "") for row in a))
    return [
        (
            kind if len(kinds) > 1 else "",
            [row for row in a if row.get("filter", "") == kind],
            [row for row in b if row.get("filter", "") == kind],
        )
        for kind in kinds
    ]


def _distinct_rows(
    task: str, a: list[Row], b: list[Row], margin: float, wanted: Sequence[str] | None
) -> list[MetricComparison]:
    before, after = distinct_estimates(a), distinct_estimates(b)
    return [
        compare_estimates(task, name, before[name], after[name], difference, margin)
        for name, difference in distinct_differences(a, b).items()
        if wanted is None or name.split(",")[0] in wanted
    ]


def _gate(a: Run, b: Run, margin: float, metrics: Sequence[str], seed: int) -> Gate | None:
    tasks = [task for task in a.tasks if task in b.tasks and _generated(a, b, task)]
    if not tasks:
        return None
    records = (run.tasks[tasks[0]] for run in (a, b))
    return generation_gate(*records, margin=margin, metrics=metrics, seed=seed)


def _generated(a: Run, b: Run, task: str) -> bool:
    """Whether both runs hold records of ``generation_quality``."""
    needed = {"loop", "tokens", "filter", "length"}
    return all(needed <= row.keys() for run in (a, b) for row in run.tasks[task])


def _other_tokens(a: list[Row], b: list[Row], metric: Metric) -> bool:
    one, other = (
        {(r.get("id", r.get("doc_id"))): r[metric.weight] for r in rows} for rows in (a, b)
    )
    return one != other
