"""How many components a truncation keeps: a policy of the plan, or what a number of parameters
allows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from mlx_svd.analyze.subject import Subject
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.source.families import Projection


@dataclass(frozen=True)
class Rank:
    """policy: for each matrix; parameters: of the whole model, None = not what decides. A matrix
    counts r (m + n), or m n where that is less."""

    policy: RankPolicy | None
    parameters: int | None = None

    def fitted(self, subject: Subject, projections: Sequence[Projection]) -> "Rank":
        """With the ratio at which the whole model has at most ``parameters``."""
        if self.parameters is None:
            return self
        total = sum(v.size for _, v in tree_flatten(subject.model.parameters()))
        fixed = total - sum(p.shape[0] * p.shape[1] for p in projections)
        ratio = fitting_ratio([p.shape for p in projections], self.parameters - fixed)
        return replace(self, policy=RankPolicy(rank_ratio=ratio))

    def choose(
        self, projection: Projection, depth: float, spectrum: Callable[[], np.ndarray]
    ) -> int:
        """The rank of one matrix."""
        try:
            return self.policy.choose(min(projection.shape), depth, spectrum)
        except MlxSvdError as error:
            raise MlxSvdError(f"{projection.path}: {error}") from error


def rank_of(options: dict[str, Any]) -> Rank:
    """From ``rank_ratio``, ``rank``, ``energy`` or ``parameters``. Raises MlxSvdError unless one of
    them is given."""
    if "parameters" in options:
        if any(name in options for name in ("rank_ratio", "rank", "energy")):
            raise MlxSvdError("parameters: goes without rank_ratio, rank and energy")
        return Rank(None, int(options["parameters"]))
    energy = options.get("energy")
    return Rank(
        RankPolicy(
            rank=options.get("rank"),
            rank_ratio=options.get("rank_ratio"),
            energy=tuple(energy) if isinstance(energy, list) else energy,
        )
    )


def factored_parameters(shapes: Sequence[tuple[int, int]], ratio: float) -> int:
    """Of matrices (m, n) at rank max(1, int(ratio * min(m, n))), each as two factors or dense,
    whichever is smaller."""
    return sum(min(m * n, max(1, int(ratio * min(m, n))) * (m + n)) for m, n in shapes)


def fitting_ratio(shapes: Sequence[tuple[int, int]], parameters: int) -> float:
    """The largest rank ratio at which the matrices have at most so many parameters. Raises
    MlxSvdError if rank 1 has more already."""
    limit = max(min(shape) for shape in shapes)
    for rank in range(limit, 0, -1):
        # Just above rank / limit, so that int() does not round a whole rank down.
        ratio = min(1.0, (rank + 1e-9) / limit)
        if factored_parameters(shapes, ratio) <= parameters:
            return ratio
    raise MlxSvdError(
        f"{parameters:,} parameters: even rank 1 has {factored_parameters(shapes, 1e-9):,}; give "
        "more, or a narrower model"
    )
