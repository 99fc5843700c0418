"""Singular values of every projection: of the weight, and weighted by what the inputs are.

The weighted spectrum is that of W C^1/2, C = E[x x^T] of the real inputs: its squares are what
each component contributes to the mean squared output. The energy of W alone takes the inputs to
be white noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from mlx_svd.analyze.ranks import break_even
from mlx_svd.analyze.subject import Subject, describe
from mlx_svd.calibrate.statistics import Calibration
from mlx_svd.linalg.metric import Metric
from mlx_svd.linalg.spectrum import component_energies, energy_kept, rank_for_energy
from mlx_svd.linalg.truncate import decompose
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.spectra import head_rows
from mlx_svd.source.families import Projection

THRESHOLDS = (0.90, 0.95, 0.99)


@dataclass(frozen=True)
class Spectrum:
    """Of one matrix (m, n), whole or one head. singular_values: descending; energy: label of a
    rank -> [rank, share of the sum of squares it keeps]; rank_for_energy: share -> smallest rank;
    effective_rank: exp(entropy of sigma / sum(sigma)) (Roy and Vetterli, 2007); stable_rank:
    sum(sigma^2) / sigma_1^2; condition_number: sigma_1 / sigma_k, None if sigma_k is zero to
    rounding; break_even_rank: the largest at which two factors are smaller than the matrix."""

    singular_values: list[float]
    energy: dict[str, tuple[int, float]]
    rank_for_energy: dict[str, int]
    effective_rank: float
    stable_rank: float
    condition_number: float | None
    break_even_rank: int


@dataclass(frozen=True)
class ProjectionSpectrum:
    """weight: of the whole matrix; heads: of each head's rows (q, k, v); mean_head_energy: label
    -> [rank, energy] of the squared mean of the heads' singular values, which is what seed 000
    calls energy; weighted, weighted_heads: the same of W C^1/2, None without calibration."""

    projection: dict
    weight: Spectrum
    heads: list[Spectrum]
    mean_head_energy: dict[str, tuple[int, float]]
    weighted: Spectrum | None
    weighted_heads: list[Spectrum] | None


def spectrum(
    subject: Subject,
    policies: dict[str, RankPolicy],
    *,
    projections: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    calibration: Calibration | None = None,
    advance: Callable[[str], None] = lambda path: None,
) -> dict:
    """Spectra of the chosen projections; JSON values.

    policies: label -> rank at which the energy is told, of the whole matrix (capped at its full
    rank) and of each head; calibration: gives C. Raises MlxSvdError for a projection or layer that
    the model lacks, and one that the calibration lacks.
    """
    chosen = subject.chosen(projections, layers)
    if calibration is not None:
        calibration.check(subject.source, ())
    rows = []
    for p in chosen:
        rows.append(asdict(projection_spectrum(subject, p, policies, calibration)))
        advance(p.path)
    weighted = None
    if calibration is not None:
        info = calibration.info
        weighted = {"origin": info.origin, "windows": info.windows, "tokens": info.tokens}
        weighted |= {"length": info.length, "digest": info.digest}
    return {
        "analysis": "spectrum",
        # The text of the subject is not read here; that of the calibration is.
        "conditions": {k: v for k, v in subject.conditions().items() if k != "text"},
        "calibration": weighted,
        "ranks": list(policies),
        "projections": rows,
    }


def projection_spectrum(
    subject: Subject,
    projection: Projection,
    policies: dict[str, RankPolicy],
    calibration: Calibration | None = None,
) -> ProjectionSpectrum:
    """The spectra of one projection."""
    weight = subject.weight(projection.path)
    depth = projection.layer / max(1, subject.layers - 1)
    rank = _Ranks(policies, depth)
    whole = component_energies(weight)
    parts = head_rows(weight, projection.heads) if projection.heads else []
    heads = [component_energies(part) for part in parts]
    mean = np.mean(np.sqrt(heads), axis=0) ** 2 if heads else np.empty(0)
    second = calibration.statistics(projection).second if calibration is not None else None
    weighted = weighted_heads = None
    if second is not None:
        # No ridge: a spectrum must not hold energy that the inputs do not have.
        metric = Metric(right=second, ridged=True)
        weighted = summary(decompose(weight, metric).energies, weight.shape, rank)
        weighted_heads = [
            summary(decompose(part, metric).energies, part.shape, rank) for part in parts
        ]
    return ProjectionSpectrum(
        describe(projection),
        summary(whole, weight.shape, rank),
        [summary(e, part.shape, rank) for e, part in zip(heads, parts, strict=True)],
        rank(mean) if heads else {},
        weighted,
        weighted_heads,
    )


def summary(
    energies: np.ndarray,
    shape: tuple[int, ...],
    energy: Callable[[np.ndarray], dict[str, tuple[int, float]]] = lambda energies: {},
) -> Spectrum:
    """What a descending spectrum of squared singular values (k,) says."""
    values = np.sqrt(energies)
    total = float(values.sum())
    shares = values[values > 0] / total if total > 0 else np.ones(1)
    # Squares come from a Gram matrix in float64: below this a singular value is rounding.
    zero = values[0] * 1e-7
    return Spectrum(
        values.tolist(),
        energy(energies),
        {f"{t:g}": rank_for_energy(energies, t) for t in THRESHOLDS},
        float(np.exp(-(shares * np.log(shares)).sum())),
        float(energies.sum() / energies[0]) if energies[0] > 0 else 1.0,
        float(values[0] / values[-1]) if values[-1] > zero else None,
        break_even(shape[0], shape[1]),
    )


@dataclass(frozen=True)
class _Ranks:
    """Energies (k,) -> label -> (rank, energy kept)."""

    policies: dict[str, RankPolicy]
    depth: float

    def __call__(self, energies: np.ndarray) -> dict[str, tuple[int, float]]:
        found = {}
        for label, policy in self.policies.items():
            limit = len(energies)
            fixed = policy.rank
            rank = (
                min(fixed, limit) if fixed else policy.choose(limit, self.depth, lambda: energies)
            )
            found[label] = (rank, energy_kept(energies, rank))
        return found
