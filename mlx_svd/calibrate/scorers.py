"""How the components of a matrix are ordered and what leaving them out costs: one interface.

| scorer | components of | order, and cost of a component | needs moments |
|---|---|---|---|
| plain | W | sigma^2 | none |
| activation | W diag(E abs(x)^1/2), ASVD (arXiv 2312.05821) | its sigma^2 | input |
| fisher | diag(row Fisher^1/2) W, FWSVD (arXiv 2207.00112) | its sigma^2 | gradient |
| importance | W | sum(abs(sigma_j u_j v_j^T) * E abs(G)), the seeds' formula | gradient |
| whitened | W C^1/2, C = E[x x^T] (SVD-LLM's optimum without its inverse) | its sigma^2 | input |
| two-sided | E[g g^T]^1/2 W C^1/2 (GFWSVD, arXiv 2505.17974) | half its sigma^2 | input, output |

The costs of ``two-sided``, in nats a token, are second-order estimates of the loss itself, so they
compare across projections as they are. Those of ``plain`` and ``importance`` are the numbers in the
table; those of the others are shares of the projection's total.
"""

from dataclasses import dataclass, replace

import numpy as np

from mlx_svd.calibrate.statistics import Calibration, Statistics
from mlx_svd.errors import MlxSvdError
from mlx_svd.linalg.metric import Metric
from mlx_svd.linalg.truncate import Decomposition, decompose, reordered
from mlx_svd.source.families import Projection

# Moments that a calibration must hold for each scorer.
SCORERS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "activation": ("input",),
    "fisher": ("gradient",),
    "importance": ("gradient",),
    "whitened": ("input",),
    "two-sided": ("input", "output"),
}
# What of them, where the calibration may lack it.
_NEEDED = {"fisher": "row_fisher", "importance": "abs_gradient", "two-sided": "output_second"}
# ASVD's exponent of the mean absolute activation.
ACTIVATION_EXPONENT = 0.5


@dataclass(frozen=True)
class Score:
    """One projection, or some of its rows, under a scorer.

    metric: None for plain and importance; importance: E abs(G) (m, n) of the importance scorer;
    window: the seeds score only the first ``window * rank`` components (2 in the original);
    second: E[x x^T] (n, n) for compensated rounding, None without calibration; target: what is to
    be approximated in place of W (m, n), None = W.
    """

    scorer: str
    metric: Metric | None = None
    importance: np.ndarray | None = None
    window: int | None = None
    second: np.ndarray | None = None
    target: np.ndarray | None = None

    def rows(self, chosen: slice) -> "Score":
        """The score of some of the rows (a head)."""
        return Score(
            self.scorer,
            self.metric and self.metric.rows(chosen),
            None if self.importance is None else self.importance[chosen],
            self.window,
            self.second,
            None if self.target is None else self.target[chosen],
        )

    def decompose(self, weight: np.ndarray, rank: int | None = None) -> Decomposition:
        """Nested factors of W (m, n) and the cost of every component; rank: the one that will be
        taken, which only the seeds' importance window depends on."""
        d = decompose(weight, self.metric)
        if self.importance is None:
            return d
        scores = component_importance(d, self.importance)
        if self.window and rank is not None:
            scores[self.window * rank :] = 0.0
        return reordered(d, scores)

    def loss(self, error: np.ndarray) -> float:
        """What an error (m, n) of the weights costs, in the units of the components."""
        if self.importance is not None:
            return float((np.abs(error) * self.importance).sum())
        return (self.metric or Metric()).loss(error)


def component_importance(d: Decomposition, importance: np.ndarray) -> np.ndarray:
    """sum(abs(sigma_j u_j v_j^T) * G) for every component j, as abs(u_j)^T G abs(v_j): two matrix
    products in place of k outer products. importance: G (m, n) >= 0; result: (k,)."""
    up, down = d.factors(len(d.energies))
    return np.einsum("mk,mk->k", np.abs(up), importance @ np.abs(down).T)


def score(
    scorer: str, weight: np.ndarray, statistics: Statistics | None, window: int | None = None
) -> Score:
    """The score of a projection W (m, n). Raises MlxSvdError for a name that is no scorer, or a
    scorer without the statistics it needs."""
    check_scorer(scorer)
    if SCORERS[scorer] and statistics is None:
        raise MlxSvdError(f"scorer {scorer}: needs a calibration; use plain without one")
    if getattr(statistics, _NEEDED.get(scorer, "second"), 0) is None:
        raise MlxSvdError(
            f"scorer {scorer}: the calibration lacks the {SCORERS[scorer][-1]} moments; calibrate "
            "again with them"
        )
    second = statistics.second if statistics is not None else None
    if scorer == "plain":
        return Score(scorer, second=second)
    if scorer == "importance":
        return Score(scorer, None, statistics.abs_gradient, window, second)
    if scorer == "two-sided":
        return Score(scorer, Metric(statistics.output_second, second, 0.5), second=second)
    if scorer == "activation":
        metric = Metric(right=statistics.mean_abs ** (2 * ACTIVATION_EXPONENT))
    elif scorer == "fisher":
        metric = Metric(left=statistics.row_fisher)
    else:
        metric = Metric(right=second)
    total = metric.loss(weight.astype(np.float64, copy=False))
    return Score(scorer, metric.in_unit(1 / total if total > 0 else 1.0), second=second)


@dataclass(frozen=True)
class Scoring:
    """A scorer and the calibration it reads; called with a projection and its weight (m, n)."""

    scorer: str = "plain"
    window: int | None = None
    calibration: Calibration | None = None

    def calibrated(self, projection: Projection) -> bool:
        """Whether there are statistics of this projection's input."""
        return self.calibration is not None and projection.name in self.calibration.info.projections

    def check(self, projection: Projection) -> None:
        """Raise MlxSvdError if the calibration lacks a projection that the scorer needs."""
        if SCORERS[self.scorer] and self.calibration is not None:
            self.calibration.require(projection.name)

    def __call__(self, projection: Projection, weight: np.ndarray) -> Score:
        self.check(projection)
        known = self.calibrated(projection)
        statistics = self.calibration.statistics(projection) if known else None
        found = score(self.scorer, weight, statistics, self.window)
        if statistics is None or statistics.drift is None:
            return found
        return replace(found, target=statistics.target(weight))


def check_scorer(scorer: str) -> None:
    """Raise MlxSvdError for a name that is no scorer."""
    if scorer not in SCORERS:
        raise MlxSvdError(f"scorer {scorer!r}: use one of {', '.join(SCORERS)}")
