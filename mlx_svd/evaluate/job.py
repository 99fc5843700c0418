"""One task made ready for one model: batches to run, and numbers made of their records."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_svd.evaluate.statistics import mean_interval, share_of

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
    order of ids -> scores; notes: what the user must know."""

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
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def mean_score(
    values: Sequence[float], *, chance: float | None = None, better: bool | None = True
) -> Score:
    """Mean of one number per item; Wilson's interval where all are 0 or 1, otherwise Student's."""
    array = np.asarray(values, dtype=np.float64)
    n, value = len(array), float(array.mean())
    if np.isin(array, (0, 1)).all():
        share = share_of(array == 1)
        low, high = share.low, share.high
    else:
        _, low, high = map(float, mean_interval(array, np.ones(n)))
    stderr = float(array.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    return Score(value, stderr, low, high, n, better, chance)
