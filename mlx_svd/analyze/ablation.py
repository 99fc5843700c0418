"""At one rank: which projection type does the damage, and does it matter which directions go?

Four ways to lose the same squared Frobenius norm of every matrix: the smallest singular directions
(truncation), random ones, the largest ones, and Gaussian noise of that norm, which has no
directions. What they differ in is not energy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_svd.analyze.effect import Effect, effect
from mlx_svd.analyze.subject import Subject
from mlx_svd.analyze.truncations import Truncations, replaced
from mlx_svd.errors import MlxSvdError
from mlx_svd.linalg.truncate import Decomposition
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.source.families import Projection

LOST = ("smallest", "random", "largest", "noise")


@dataclass(frozen=True)
class Ablation:
    """what: a projection type compressed alone, or how energy was lost; seed: of random directions
    and noise, None where nothing is drawn; energy_lost: share of all squared singular values."""

    what: str
    seed: int | None
    energy_lost: float
    effect: Effect


def by_type(
    subject: Subject,
    truncations: Truncations,
    projections: Sequence[Projection],
    policy: RankPolicy,
    advance: Callable[[str], None] = lambda done: None,
) -> list[Ablation]:
    """The effect of each projection type (q, k, v, ...) compressed alone, in all chosen layers."""
    _ = subject.base  # of the uncompressed model
    found = []
    for name in dict.fromkeys(p.name for p in projections):
        members = [p for p in projections if p.name == name]
        ranks = {p.path: truncations.rank(p, policy) for p in members}
        lost = energy_lost(truncations, members, ranks)
        with truncations.compressed(ranks):
            found.append(Ablation(name, None, lost, effect(subject)))
        advance("ablation")
    return found


def by_direction(
    subject: Subject,
    truncations: Truncations,
    projections: Sequence[Projection],
    policy: RankPolicy,
    seeds: Sequence[int] = (0, 1, 2),
    advance: Callable[[str], None] = lambda done: None,
) -> list[Ablation]:
    """The effect of losing, in every chosen matrix (or head), the energy that ``policy`` discards
    in each of the ways ``LOST``. The scorer must be plain: only singular directions are orthogonal,
    so that energies add up. Raises MlxSvdError for another one."""
    if truncations.scoring.scorer != "plain":
        raise MlxSvdError("ablation of directions: energies only add up with --scorer plain")
    _ = subject.base  # of the uncompressed model
    ranks = {p.path: truncations.rank(p, policy) for p in projections}
    lost = energy_lost(truncations, projections, ranks)
    found = []
    for kind in LOST:
        for seed in seeds if kind in ("random", "noise") else (None,):
            rng = np.random.default_rng(seed)
            weights = {}
            for p in projections:
                parts = truncations.decompositions(p)
                r = ranks[p.path]
                each = (r,) * len(parts) if isinstance(r, int) else r
                weights[p.path] = np.concatenate(
                    [without(d, k, kind, rng) for d, k in zip(parts, each, strict=True)]
                )
            with replaced(subject, weights):
                found.append(Ablation(kind, seed, lost, effect(subject)))
            advance("ablation")
    return found


def without(d: Decomposition, rank: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    """W (m, n) less the energy that truncation to ``rank`` loses, float64. The last direction taken
    is only weakened, so that the energy is met exactly."""
    target = float(d.energies[rank:].sum())
    if kind == "noise":
        noise = rng.standard_normal(d.weight.shape)
        return d.weight + noise * np.sqrt(target / (noise**2).sum())
    count = len(d.energies)
    order = {
        "smallest": np.arange(count)[::-1],
        "largest": np.arange(count),
        "random": rng.permutation(count),
    }[kind]
    energies = d.energies[order]
    before = np.cumsum(energies) - energies
    # A direction of energy e scaled to 1 - f loses f^2 e.
    share = np.divide(target - before, energies, out=np.zeros(count), where=energies > 0)
    cut = np.sqrt(np.clip(share, 0.0, 1.0))
    up, down = d.factors(count)
    return d.weight - (up[:, order] * cut) @ down[order]


def energy_lost(truncations: Truncations, projections: Sequence[Projection], ranks) -> float:
    """Share of the energy (in the scorer's metric) of these projections that the ranks discard."""
    lost = total = 0.0
    for p in projections:
        parts, r = truncations.decompositions(p), ranks[p.path]
        each = (r,) * len(parts) if isinstance(r, int) else r
        lost += sum(float(d.energies[k:].sum()) for d, k in zip(parts, each, strict=True))
        total += sum(float(d.energies.sum()) for d in parts)
    return lost / total if total > 0 else 0.0
