"""A comparison as a table: cells, Markdown, CSV."""

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path

from mlx_svd.checkpoint.disk import write_file
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.comparison.compare import Comparison
from mlx_svd.evaluate.comparison.metric_comparison import AT_CHANCE, NOT_SHOWN, MetricComparison
from mlx_svd.evaluate.statistics.intervals import Estimate
from mlx_svd.strict_json import finite

HEAD = (
    "task", "metric", "n", "A (se)", "B (se)", "B - A [95 %]", "flips -/+", "p", "p Holm", "TOST p",
    "verdict", "detects",
)  # fmt: skip
_CSV = (
    "task", "metric", "n", "a", "a_stderr", "a_low", "a_high", "a_mark", "b", "b_stderr", "b_low",
    "b_high", "b_mark", "difference", "stderr", "low", "high", "interval", "bootstrap_low",
    "bootstrap_high", "p", "test", "p_holm", "lost", "gained", "margin", "tost_p", "tost_low",
    "tost_high", "verdict", "detects", "needed", "missing",
)  # fmt: skip


def table_rows(comparison: Comparison) -> list[list[str]]:
    """Cells under HEAD of every line."""
    return [_cells(row) for row in comparison.rows]


def remarks(comparison: Comparison) -> list[str]:
    """What the table does not say by itself: claims for which n is too small, the gate, notes."""
    lines = _too_small(comparison)
    gate = comparison.gate
    if gate is not None:
        lines += [f"gate: {gate.verdict}", *(f"gate, {line}" for line in gate.lines)]
    return lines + comparison.notes


def legend(comparison: Comparison) -> str:
    """What the columns are, in one paragraph."""
    tests = sum(row.p_holm is not None for row in comparison.rows)
    return (
        f"A: {comparison.a}. B: {comparison.b}. (se): standard error. Differences are paired by "
        "item; flips: from 1 (right) to 0 / from 0 to 1; p: exact McNemar for 0 and 1, else sign "
        f"flips (distinct: t); Holm over the {tests} lines with a verdict; TOST: equal within "
        f"{comparison.margin:g} (in nats/token: of a perplexity, as a share); detects: smallest "
        "difference shown with 80 % power."
    )


def markdown(comparison: Comparison) -> str:
    """Legend, table and remarks."""
    lines = [legend(comparison), "", _line(HEAD), _line(["---"] * len(HEAD))]
    lines += [_line(cells) for cells in table_rows(comparison)]
    notes = [f"- {line}" for line in remarks(comparison)]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def csv_text(comparison: Comparison) -> str:
    """One line for each metric, every number in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    writer.writerows(_numbers(row, comparison.margin) for row in comparison.rows)
    return text.getvalue()


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """compare.json, compare.md and compare.csv in a folder, which is made if need be. Raises
    MlxSvdError if they cannot be written."""
    texts = {"json": json_text(comparison), "md": markdown(comparison), "csv": csv_text(comparison)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for ending, text in texts.items():
            write_file(folder / f"compare.{ending}", text.encode())
    except OSError as error:
        raise MlxSvdError(
            f"{folder}: cannot be written: {error.strerror or error}; give another --output-dir"
        ) from error


def json_text(comparison: Comparison) -> str:
    """The whole record; infinite numbers (of a single item) are null, as JSON has none."""
    import json

    return json.dumps(finite(comparison.record()), indent=2, allow_nan=False) + "\n"


def _cells(row: MetricComparison) -> list[str]:
    d, equal = row.difference, row.equivalence
    return [
        row.task,
        row.metric,
        str(d.n),
        _score(row.a, row.mark_a),
        _score(row.b, row.mark_b),
        f"{_signed(d.value)} [{_signed(d.low)}, {_signed(d.high)}]",
        f"{row.flips.lost}/{row.flips.gained}" if row.flips else "",
        _p(d.p),
        "" if row.p_holm is None else _p(row.p_holm),
        _p(equal.p) if equal else "",
        row.verdict,
        _number(row.detects),
    ]


def _too_small(comparison: Comparison) -> list[str]:
    """One line for each kind of claim that the items are too few for."""
    lines = []
    if at_chance := [row for row in comparison.rows if row.verdict == AT_CHANCE]:
        named = "; ".join(f"{_detects(row)}" for row in at_chance)
        lines.append(
            "neither model is shown to be above chance; take more items, or a task that A can do: "
            + named
        )
    if not_shown := [row for row in comparison.rows if row.verdict == NOT_SHOWN]:
        named = "; ".join(f"{_detects(row)}, takes {_needed(row)}" for row in not_shown)
        lines.append(
            "n too small for these claims (how many items would show two equal models equal within "
            f"{comparison.margin:g}): {named}"
        )
    return lines


def _detects(row: MetricComparison) -> str:
    return (
        f"{row.task}, {row.metric}: detects differences above {_number(row.detects)} with "
        f"n = {row.difference.n:,}"
    )


def _needed(row: MetricComparison) -> str:
    return "more" if row.needed is None or math.isinf(row.needed) else f"about {row.needed:,}"


def _numbers(row: MetricComparison, margin: float) -> Iterable:
    d, f, e = row.difference, row.flips, row.equivalence
    return (
        row.task, row.metric, d.n, row.a.value, row.a.error, row.a.low, row.a.high, row.mark_a,
        row.b.value, row.b.error, row.b.low, row.b.high, row.mark_b, d.value, d.error, d.low,
        d.high, d.method, *(d.bootstrap or ("", "")), d.p, d.test,
        "" if row.p_holm is None else row.p_holm,
        *((f.lost, f.gained) if f else ("", "")),
        *((margin, e.p, e.low, e.high) if e else ("", "", "", "")),
        row.verdict, row.detects, "" if row.needed is None else row.needed, row.missing,
    )  # fmt: skip


def _score(score: Estimate, mark: str) -> str:
    return f"{_number(score.value)} ({_number(score.error)}) {mark}".strip()


def _number(value: float) -> str:
    """Four decimals for shares and losses, fewer for long numbers."""
    text = f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    return text.replace("inf", "∞")


def _signed(value: float) -> str:
    text = f"{value:+.4f}" if abs(value) < 10 else f"{value:+.1f}"
    return text.replace("inf", "∞")


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
