"""Which numbers of a task's rows can be compared item by item, and which direction is good."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_svd.evaluate.comparison.samples import Run
from mlx_svd.evaluate.generation.summary import QUALITY_METRICS
from mlx_svd.evaluate.statistics.pairing import Row

# Metrics of one item, where a run does not say which are its own: whether more is better.
_KNOWN: dict[str, bool | None] = {
    **dict.fromkeys(("acc", "acc_norm", "acc_bytes", "mc1", "mc2", "exact_match", "f1"), True),
    **dict.fromkeys(("recalled", "recalled_norm", "agreement", "retained"), True),
    "kl": False,
    **QUALITY_METRICS,
}
# Per-item names of how many tokens or bytes a log-likelihood is of.
_TOKENS = ("num_tokens", "token_count", "tokens")
_BYTES = ("num_bytes", "byte_count", "bytes")
# lm-eval keeps [log-likelihood, words or bytes] for these; the last one says the same again.
_WEIGHTED = {"word_perplexity": "nats/word", "bits_per_byte": "bits/byte", "byte_perplexity": None}
# Per item this is a log-likelihood in lm-eval (LAMBADA), although a task's value is its exp(-mean).
_LOG_LIKELIHOOD = "perplexity"


@dataclass(frozen=True)
class Metric:
    """name: shown; field: of the rows; weight: field that the value is a sum over, None: one a row;
    better: True if more is better, False if less, None if neither."""

    name: str
    field: str
    weight: str | None
    better: bool | None


def row_metrics(run: Run, task: str) -> tuple[list[Metric], list[str]]:
    """(comparable metrics of a task, names of those that have no number per item).

    Which they are: the rows' own "metrics" list (lm-eval), else what results.json says is higher or
    lower better, else names that are known; and for rows with a "loglikelihood" of a counted number
    of tokens or bytes nats/token and bits/byte. Rows get fields for what has to be computed.
    """
    rows = run.tasks[task]
    declared = run.of_task("higher_is_better", task) or {}
    better = {**_KNOWN, **{k: v for k, v in declared.items() if isinstance(v, bool)}}
    found, skipped = [], []
    for name in _names(rows, declared):
        values = [row[name] for row in rows if row.get(name) is not None]
        if name in _WEIGHTED:
            found += _weighted(rows, name)
        elif name == _LOG_LIKELIHOOD and all(isinstance(v, (int, float)) for v in values):
            _negate(rows, name, "nats/item", 1.0)
            found.append(Metric("nats/item", "nats/item", None, False))
        elif values and all(isinstance(v, (int, float)) for v in values):
            found.append(Metric(name, name, None, better.get(name)))
        elif values:
            skipped.append(name)
    return found + _per_token_and_byte(rows), skipped


def _names(rows: Sequence[Row], declared: dict) -> list[str]:
    """Names of metrics in the order of the rows."""
    listed: dict[str, None] = {}
    for row in rows:
        listed.update(dict.fromkeys(row.get("metrics", ())))
    if listed:
        return [name for name in listed if name != "bypass"]
    fields = dict.fromkeys(key for row in rows for key in row)
    return [name for name in fields if name in declared or name in _KNOWN]


def _weighted(rows: Sequence[Row], name: str) -> list[Metric]:
    shown = _WEIGHTED[name]
    if shown is None:
        return []
    weight = f"{shown} weight"
    for row in rows:
        log_likelihood, count = row[name]
        row[shown] = -log_likelihood / (math.log(2) if name == "bits_per_byte" else 1)
        row[weight] = count
    return [Metric(shown, shown, weight, False)]


def _per_token_and_byte(rows: Sequence[Row]) -> list[Metric]:
    found = []
    for shown, names, unit in (("nats/token", _TOKENS, 1.0), ("bits/byte", _BYTES, math.log(2))):
        for weight in names:
            if all(
                isinstance(row.get("loglikelihood"), (int, float))
                and isinstance(row.get(weight), int)
                for row in rows
            ):
                _negate(rows, "loglikelihood", shown, unit)
                found.append(Metric(shown, shown, weight, False))
                break
    return found


def _negate(rows: Sequence[Row], name: str, shown: str, unit: float) -> None:
    for row in rows:
        row[shown] = None if row.get(name) is None else -row[name] / unit
