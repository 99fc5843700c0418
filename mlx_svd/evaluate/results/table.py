"""The scores of a results.json as rows, Markdown and CSV."""

import csv
import io
from pathlib import Path
from typing import Any

from mlx_svd.checkpoint.disk import replace_file
from mlx_svd.evaluate.jobs.job import metric_key

HEADER = ("task", "shots", "metric", "value", "95 % interval", "stderr", "chance", "n", "")

_MARKS = {
    "chance": "the interval holds what guessing gives; do not read it as a score",
    "below chance": "the model prefers wrong choices (as the shorter ones), or scorer, prompt or "
    "model are broken",
}


def score_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each metric, under ``HEADER``. An arrow says which direction is better."""
    rows = []
    for task, metrics in results["intervals"].items():
        values = results["results"][task]
        for name, interval in metrics.items():
            stderr = values[metric_key(name, "_stderr")]
            better = results["higher_is_better"][task][name]
            arrow = {True: " ↑", False: " ↓", None: ""}[better]
            chance = interval["chance"]
            rows.append(
                (
                    task,
                    str(results["n-shot"][task]),
                    name + arrow,
                    number(values[metric_key(name)]),
                    f"{number(interval['low'], '-∞')} – {number(interval['high'])}",
                    number(stderr) if isinstance(stderr, float) else "-",
                    number(chance) if chance is not None else "-",
                    str(interval["n"]),
                    _mark(interval),
                )
            )
    return rows


def _mark(interval: dict[str, Any]) -> str:
    """What a score says against guessing, see ``statistics.intervals.chance_mark``."""
    if interval["at_chance"]:
        return "chance"
    chance = interval["chance"]
    below = chance is not None and interval["high"] is not None and interval["high"] < chance
    return "below chance" if below else ""


def legend(results: dict[str, Any]) -> list[str]:
    """What the marks that stand in ``score_rows`` mean, one line for each."""
    marks = {row[-1] for row in score_rows(results)}
    return [f"{mark}: {said}" for mark, said in _MARKS.items() if mark in marks]


def number(value: float | None, infinite: str = "∞") -> str:
    """Four digits after the point below 10, five significant ones above; None is infinite."""
    if value is None:
        return infinite
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.5g}"


def markdown(results: dict[str, Any]) -> str:
    """A table with its conditions below."""
    lines = [
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(row) + " |" for row in score_rows(results)),
        "",
        f"Model {results['model_name']}, {results['config']['model_sha'][:12]}; "
        f"{float(results['total_evaluation_time_seconds']):.0f} s, peak memory "
        f"{results['peak_memory']['process'] / 1e9:.2f} GB; `{results['command']}`",
    ]
    remarks = [*legend(results), *results["notes"]]
    lines += ["", *(f"- {remark}" for remark in remarks)] if remarks else []
    return "\n".join(lines) + "\n"


def as_csv(results: dict[str, Any]) -> str:
    """The same rows with full precision, one column for each number."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("model", "task", "shots", "metric", "value", "low", "high", "stderr",
                     "chance", "at_chance", "n"))  # fmt: skip
    for task, metrics in results["intervals"].items():
        values = results["results"][task]
        for name, interval in metrics.items():
            writer.writerow(
                (
                    results["model_name"],
                    task,
                    results["n-shot"][task],
                    name,
                    values[metric_key(name)],
                    interval["low"],
                    interval["high"],
                    values[metric_key(name, "_stderr")],
                    interval["chance"],
                    interval["at_chance"],
                    interval["n"],
                )
            )
    return stream.getvalue()


def write_tables(folder: Path, results: dict[str, Any]) -> None:
    """Write results.md and results.csv."""
    replace_file(folder / "results.md", markdown(results).encode())
    replace_file(folder / "results.csv", as_csv(results).encode())
