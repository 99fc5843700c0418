"""The scorers as the literature defines them, with explicit roots and inverses."""

import numpy as np

from mlx_svd.calibrate.statistics import Statistics
from mlx_svd.linalg.metric import LEFT_RIDGE, RIGHT_RIDGE


def definition(scorer: str, weight: np.ndarray, s: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """(left, right): the matrices between which the scorer takes the SVD of W. The ridges are
    those that keep unseen directions invertible."""
    m, n = weight.shape
    if scorer == "activation":  # ASVD: W diag(E|x|^0.5)
        return np.eye(m), np.diag((s.mean_abs + RIGHT_RIDGE * s.mean_abs.mean()) ** 0.5)
    if scorer == "fisher":  # FWSVD: diag(sqrt of the rows' Fisher information) W
        return np.diag((s.row_fisher + LEFT_RIDGE * s.row_fisher.mean()) ** 0.5), np.eye(n)
    right = np.linalg.cholesky(s.second + RIGHT_RIDGE * np.trace(s.second) / n * np.eye(n))
    if scorer == "whitened":  # SVD-LLM: W S with S S^T = E[x x^T]
        return np.eye(m), right
    ridge = LEFT_RIDGE * np.trace(s.output_second) / m
    return np.linalg.cholesky(s.output_second + ridge * np.eye(m)).T, right


def seeds_importance(weight: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The seeds' loop over outer products: score of every component, and the components."""
    u, sigma, v = np.linalg.svd(weight, full_matrices=False)
    components = [sigma[j] * np.outer(u[:, j], v[j]) for j in range(len(sigma))]
    return np.array([(np.abs(c) * g).sum() for c in components]), components


def optimum(scorer: str, weight: np.ndarray, s: Statistics, rank: int, window: int | None = None):
    """The rank-r matrix that a scorer keeps of W (m, n)."""
    if scorer == "importance":
        scores, components = seeds_importance(weight, s.abs_gradient)
        scores[(window or len(scores)) * rank :] = 0
        return sum(components[j] for j in np.argsort(-scores, kind="stable")[:rank])
    m, n = weight.shape
    left, right = (np.eye(m), np.eye(n)) if scorer == "plain" else definition(scorer, weight, s)
    u, sigma, v = np.linalg.svd(left @ weight @ right, full_matrices=False)
    kept = np.linalg.solve(left, (u[:, :rank] * sigma[:rank]) @ v[:rank])
    return np.linalg.solve(right.T, kept.T).T
