"""What one run of a condition measured, item by item, and the JSON record that keeps it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.statistics.intervals import safe_exp

MEAN, EXP = "mean", "exp"


@dataclass(frozen=True)
class Metric:
    """items (n,): names, the same for the same question in every run; values (n,): of the metric,
    summed over the tokens of the item where it is per token; weights (n,): tokens of each item, 1
    where values are not sums; scale: the number shown is the mean, or e to the mean (perplexity);
    better: whether more is better, None if neither; chance: what guessing gives, None without;
    share: every value is wrong (0) or right (1).
    """

    items: tuple[str, ...]
    values: tuple[float, ...]
    weights: tuple[float, ...]
    scale: str = MEAN
    better: bool | None = True
    chance: float | None = None
    share: bool = False

    def __post_init__(self):
        if len(set(self.items)) < len(self.items):
            raise MlxSvdError("a metric has two items of one name; rename one")
        if not len(self.items) == len(self.values) == len(self.weights) or not self.items:
            raise MlxSvdError("a metric needs at least one item, with one value and weight each")
        if not np.isfinite(self.values).all():
            worst = int(np.argmin(np.isfinite(self.values)))
            raise MlxSvdError(f"item {self.items[worst]!r}: its value is not a finite number")

    @property
    def mean(self) -> float:
        """Sum of values over sum of weights."""
        return float(np.sum(self.values) / np.sum(self.weights))

    def shown(self, mean: float) -> float:
        """A mean as it is shown."""
        return safe_exp(mean) if self.scale == EXP else mean


@dataclass
class Measured:
    """metrics: by name; numbers: what has no items (bytes, seconds of training); notes: what a
    reader must know; details: more for the record."""

    metrics: dict[str, Metric]
    numbers: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def metric_of(
    items: Sequence[str],
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    scale: str = MEAN,
    better: bool | None = True,
    chance: float | None = None,
    share: bool | None = None,
) -> Metric:
    """A metric from arrays; share: None = whether the values are boolean."""
    if share is None:
        share = np.asarray(values).dtype == bool
    given = [1.0] * len(items) if weights is None else [float(w) for w in weights]
    numbers = tuple(float(v) for v in values)
    return Metric(tuple(map(str, items)), numbers, tuple(given), scale, better, chance, bool(share))


def to_json(measured: Measured) -> dict[str, Any]:
    """Part of a record."""
    return asdict(measured)


def from_json(record: dict[str, Any]) -> Measured:
    """What ``to_json`` put into a record."""
    metrics = {
        name: Metric(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})
        for name, entry in record["metrics"].items()
    }
    return Measured(metrics, record["numbers"], record["notes"], record["details"])
