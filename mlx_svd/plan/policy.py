"""How many singular values to keep: a rank, a share of them, or a share of the energy."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.linalg.spectrum import rank_for_energy


@dataclass(frozen=True)
class RankPolicy:
    """Exactly one of rank, rank_ratio and energy.

    rank_ratio: rank = int(rank_ratio * min(m, n)), at least 1; energy: smallest rank that keeps
    this share of sum(sigma^2), or (first, last): a share that goes linearly from the first layer
    to the last; min_rank_ratio: floor under the rank, as a share of min(m, n).
    """

    rank: int | None = None
    rank_ratio: float | None = None
    energy: float | tuple[float, float] | None = None
    min_rank_ratio: float = 0.0

    def __post_init__(self):
        given = [n for n in ("rank", "rank_ratio", "energy") if getattr(self, n) is not None]
        if len(given) != 1:
            raise MlxSvdError(
                f"give exactly one of rank, rank_ratio and energy, not {' and '.join(given) or 0}"
            )
        if self.rank is not None and self.rank < 1:
            raise MlxSvdError(f"rank {self.rank}: must be at least 1")
        shares = [("rank_ratio", self.rank_ratio), *(("energy", e) for e in self.energies or ())]
        for name, value in shares:
            if value is not None and not 0 < value <= 1:
                raise MlxSvdError(f"{name} {value}: must be above 0 and at most 1")
        if not 0 <= self.min_rank_ratio <= 1:
            raise MlxSvdError(f"min_rank_ratio {self.min_rank_ratio}: must be between 0 and 1")

    @property
    def energies(self) -> tuple[float, ...] | None:
        """The energy shares given, None for the other policies."""
        if self.energy is None:
            return None
        return self.energy if isinstance(self.energy, tuple) else (self.energy,)

    def choose(self, limit: int, depth: float, spectrum: Callable[[], np.ndarray]) -> int:
        """The rank for one matrix, 1..limit, before any rounding to a multiple.

        limit: min(m, n); depth: 0 in the first layer, 1 in the last; spectrum: gives the squared
        singular values, called by the energy policy only. Raises MlxSvdError if a fixed rank is
        over the limit.
        """
        if self.rank is not None:
            if self.rank > limit:
                raise MlxSvdError(
                    f"rank {self.rank} is over min(m, n) = {limit}; use a smaller rank or "
                    "rank_ratio, or a rule for this projection"
                )
            rank = self.rank
        elif self.rank_ratio is not None:
            rank = max(1, int(self.rank_ratio * limit))
        else:
            first, last = self.energies[0], self.energies[-1]
            rank = rank_for_energy(spectrum(), first + (last - first) * depth)
        return max(rank, int(self.min_rank_ratio * limit))


def round_rank(rank: int, multiple: int, limit: int, up: bool) -> int | None:
    """The nearest multiple of ``multiple`` in [multiple, limit] (ties upwards), the next one
    above with ``up``; None if even one multiple is over the limit."""
    if multiple > limit:
        return None
    steps = -(-rank // multiple) if up else (2 * rank + multiple) // (2 * multiple)
    return min(max(steps, 1), limit // multiple) * multiple


def parse_energy(text: str) -> float | tuple[float, float]:
    """'0.95', or '0.96:0.98' for a ramp from the first layer to the last."""
    try:
        shares = tuple(float(part) for part in text.split(":"))
    except ValueError:
        shares = ()
    if len(shares) not in (1, 2):
        raise MlxSvdError(f"energy {text!r}: give a share such as 0.95, or first:last, 0.96:0.98")
    return shares[0] if len(shares) == 1 else shares
