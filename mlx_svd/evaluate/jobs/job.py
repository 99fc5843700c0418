"""One task made ready for one model: batches to run, and numbers made of their records."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_svd.evaluate.statistics.intervals import Estimate, estimate
from mlx_svd.strict_json import finite

Record = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """A metric of a whole task. stderr: standard error as lm-eval's (None: not defined); low,
    high: 95 % interval; n: items; higher_is_better: or None if neither; chance: what guessing
    gives, or None."""

    value: float
    stderr: float | None
    low: float
    high: float
    n: int
    higher_is_better: bool | None = True
    chance: float | None = None

    @property
    def at_chance(self) -> bool:
        """The interval holds what guessing gives."""
        return self.chance is not None and self.low <= self.chance <= self.high


@dataclass
class Job:
    """task, version, shots: for the results; ids: of the documents; doc_ids: their numbers in the
    whole set of ``total``; digest, origin: of the data; config: more for the results; batches:
    indices of documents, which ``run`` turns into one record each; summarize: all records in the
    order of ids -> scores, from these ``fields`` of a record, of these types; notes: what the user
    must know."""

    task: str
    version: float
    shots: int
    ids: list[str]
    doc_ids: list[int]
    total: int
    digest: str
    origin: str
    batches: list[tuple[int, ...]]
    run: Callable[[int], list[Record]]
    summarize: Callable[[Sequence[Record]], dict[str, Score]]
    fields: Mapping[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def numbers(names: Iterable[str]) -> dict[str, Any]:
    """``Job.fields`` that are numbers."""
    return dict.fromkeys(names, int | float)


def metric_key(name: str, what: str = "") -> str:
    """lm-eval's key of a metric: "acc" -> "acc,none", "loop,greedy" as it is; what: "_stderr"."""
    metric, _, kind = name.partition(",")
    return f"{metric}{what},{kind or 'none'}"


def mean_score(
    values: Sequence[float],
    *,
    chance: float | None = None,
    better: bool | None = True,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Score:
    """Mean of one number per item, as ``statistics.estimate``; bounds: of what a number can be."""
    found = estimate(np.asarray(values), bounds=bounds)
    return score_of(found, chance=chance, better=better)


def score_of(found: Estimate, *, chance: float | None = None, better: bool | None = True) -> Score:
    """An estimate as the score of a task. One item has no standard error."""
    return Score(found.value, finite(found.error), found.low, found.high, found.n, better, chance)
