"""Per-item rows of two runs -> for each metric the same items in the same order."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_svd.errors import MlxSvdError

Row = dict[str, Any]
# What may be kept in a row of the question and of how it was asked.
_CONDITIONS = ("doc_hash", "prompt_hash", "target_hash", "prompt", "seed", "settings")
_REMEDY = "evaluate both with the same data, --limit and seeds"


@dataclass(frozen=True)
class Paired:
    """One metric of two runs. name: "metric" or "metric,filter" (several ways to read one answer,
    or to generate it); ids (N,): items; sums_a, sums_b (N,): of the metric over the rows of each
    item; counts (N,): rows of each item, or tokens or bytes where the metric is per token or byte;
    missing: items left out because the metric is null in one of the runs."""

    name: str
    ids: tuple[str, ...]
    sums_a: np.ndarray
    sums_b: np.ndarray
    counts: np.ndarray
    missing: int

    @property
    def a(self) -> float:
        """Mean of run a."""
        return float(self.sums_a.sum() / self.counts.sum())

    @property
    def b(self) -> float:
        """Mean of run b."""
        return float(self.sums_b.sum() / self.counts.sum())


def check_same_items(task: str, a: Sequence[Row], b: Sequence[Row]) -> None:
    """Raise MlxSvdError naming the task and the first item that only one run has, or has oftener,
    or whose question (the hashes or the prompt kept in the rows) differs."""
    rows_a, rows_b = _by_key(a), _by_key(b)
    only_a = [k for k in rows_a if k not in rows_b]
    only_b = [k for k in rows_b if k not in rows_a]
    if only_a or only_b:
        first = _name((only_a or only_b)[0])
        raise MlxSvdError(
            f"{task}: the runs have different items: {len(only_a)} only in A, {len(only_b)} only "
            f"in B, the first is {first}; {_REMEDY}"
        )
    for key, rows in rows_a.items():
        if len(rows) != len(rows_b[key]):
            raise MlxSvdError(
                f"{task}: item {_name(key)} has {len(rows)} rows in A and {len(rows_b[key])} in B; "
                f"{_REMEDY}"
            )
        for one, other in zip(rows, rows_b[key], strict=True):
            for name in _CONDITIONS:
                if name in one and name in other and one[name] != other[name]:
                    raise MlxSvdError(
                        f"{task}: item {_name(key)} is not the same question in both: {name} "
                        f"differs; {_REMEDY}"
                    )


def pair_metric(
    task: str, name: str, metric: str, a: Iterable[Row], b: Iterable[Row], weight: str | None = None
) -> Paired | None:
    """Pair the numbers in field ``metric`` of the rows by item; None if no item has it in both.

    weight: field with the number of tokens or bytes that the metric is a sum over; by default each
    row counts once. Rows must have passed ``check_same_items``. Raises MlxSvdError naming task,
    item and metric for what is no finite number, and for weights that differ between the runs.
    """
    sums: dict[str, list[float]] = {}
    missing: set[str] = set()
    rows_a, rows_b = _by_key(a), _by_key(b)
    for key, rows in rows_a.items():
        item = key[0]
        for one, other in zip(rows, rows_b[key], strict=True):
            values = [_number(task, item, metric, r.get(metric)) for r in (one, other)]
            weights = [
                _number(task, item, weight, r.get(weight)) if weight else 1.0 for r in (one, other)
            ]
            if None in values or None in weights:
                missing.add(item)
                continue
            if weights[0] != weights[1]:
                raise MlxSvdError(
                    f"{task}: item {item!r} has {weights[0]:g} {weight} in A and {weights[1]:g} in "
                    f"B; {_REMEDY}"
                )
            total = sums.setdefault(item, [0.0, 0.0, 0.0])
            for i, value in enumerate((*values, weights[0])):
                total[i] += value
    for item in missing:
        sums.pop(item, None)
    if not sums:
        return None
    ids = tuple(sorted(sums))
    columns = np.array([sums[item] for item in ids]).T
    if not columns[2].all():
        empty = ids[int(np.argmin(columns[2]))]
        raise MlxSvdError(f"{task}: item {empty!r} has 0 {weight}; evaluate it again")
    return Paired(name, ids, *columns, len(missing))


def _by_key(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """(item, filter) -> its rows in the order of their seeds, else of the file."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((item_id(row), str(row.get("filter", ""))), []).append(row)
    for same in found.values():
        same.sort(key=lambda row: row.get("seed") or 0)
    return found


def item_id(row: Row) -> str:
    """The id of a row's item: its id, or the number of its document (lm-eval has no ids)."""
    return str(row["id"]) if "id" in row else str(row["doc_id"])


def _name(key: tuple[str, str]) -> str:
    item, kind = key
    return f"{item!r} ({kind})" if kind and kind != "none" else repr(item)


def _number(task: str, item: str, metric: str, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not np.isfinite(value):
        raise MlxSvdError(
            f"{task}: item {item!r}: {metric} is {value!r}, not a finite number; evaluate it again"
        )
    return float(value)
