"""Singular values of a weight matrix, and how many of them hold a share of the energy.

One eigen-decomposition of the smaller Gram matrix in float64 takes the place of a full SVD: it
gives every rank at once and is many times faster on the wide k and v matrices of grouped-query
attention.
"""

import numpy as np


def gram(weight: np.ndarray) -> np.ndarray:
    """The smaller of W W^T and W^T W in float64; weight: (m, n), result: (k, k), k = min(m, n)."""
    w = weight.astype(np.float64, copy=False)
    return w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w


def component_energies(weight: np.ndarray) -> np.ndarray:
    """Squared singular values of an (m, n) matrix, largest first, shape (min(m, n),)."""
    return energies_of(np.linalg.eigvalsh(gram(weight)))


def energies_of(eigenvalues: np.ndarray) -> np.ndarray:
    """Ascending eigenvalues of a Gram matrix -> energies: descending, rounding below 0 removed."""
    return np.maximum(eigenvalues[::-1], 0.0)


def energy_kept(energies: np.ndarray, rank: int) -> float:
    """Share of sum(sigma^2) in the ``rank`` largest singular values; 1.0 for a zero matrix."""
    total = float(energies.sum())
    return float(energies[:rank].sum()) / total if total > 0 else 1.0


def rank_for_energy(energies: np.ndarray, share: float) -> int:
    """Smallest rank >= 1 that keeps at least ``share`` (0..1] of the energy."""
    total = float(energies.sum())
    if total <= 0:
        return 1
    cumulative = np.cumsum(energies)
    # Relative slack: at share 1 the rounding of the sums must not ask for one rank more.
    wanted = share * total * (1 - 1e-12)
    return min(int(np.searchsorted(cumulative, wanted)) + 1, len(energies))
