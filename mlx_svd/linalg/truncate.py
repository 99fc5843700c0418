"""The best rank-r approximation of a matrix, for every r from one decomposition.

Plain: with W W^T = U diag(sigma^2) U^T the optimum of rank r is U_r (U_r^T W) (Eckart and Young).
In a metric: with A = L^1/2 W and A R A^T = P diag(lambda) P^T it is L^-1/2 P_r (P_r^T A), which
needs no inverse of R, so R may be singular. The second factor is computed from W itself, so an
error in the subspace enters only squared.
"""

from dataclasses import dataclass

import numpy as np

from mlx_svd.linalg.metric import Metric
from mlx_svd.linalg.spectrum import energies_of, gram

# Components smaller than this share of the largest are zero in float64 (they come from a Gram).
ZERO_COMPONENT = 1e-12


@dataclass(frozen=True)
class Decomposition:
    """W (m, n) as k = min(m, n) components in the order in which they are kept.

    basis: (m, k) of left vectors in the metric, or (n, k) of right singular vectors; energies:
    (k,) what leaving out each component costs (squared singular values in the metric, times its
    unit), descending.
    """

    weight: np.ndarray
    basis: np.ndarray
    energies: np.ndarray
    left: bool
    metric: Metric | None = None

    @property
    def complete(self) -> bool:
        """The basis spans all m output dimensions."""
        return self.left and self.basis.shape[0] == self.basis.shape[1]

    def _part(self, chosen: slice) -> tuple[np.ndarray, np.ndarray]:
        """Factors of some components."""
        side = self.basis[:, chosen]
        if not self.left:
            return self.weight @ side, side.T
        if self.metric is None:
            return side, side.T @ self.weight
        return self.metric.unscaled(side), self.metric.scaled(side).T @ self.weight

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """up (m, r) and down (r, n) with up @ down the best rank-r approximation, float64."""
        return self._part(slice(rank))

    def dropped(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """up (m, k - r) and down (k - r, n) of what the rank leaves out."""
        return self._part(slice(rank, None))

    def dropped_space(self, rank: int) -> np.ndarray:
        """(m, m - r) vectors to which every column of the rank-r approximation is orthogonal, of a
        complete decomposition."""
        side = self.basis[:, rank:]
        return side if self.metric is None else np.linalg.qr(self.metric.scaled(side))[0]

    def balanced_factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Both factors of a component get the same norm (U sqrt(S) and sqrt(S) V^T if plain).

        The ranks nest: the factors of rank r are the first columns and rows of those of r + 1.
        """
        up, down = self.factors(rank)
        norms = np.linalg.norm(up, axis=0), np.linalg.norm(down, axis=1)
        size = norms[0] * norms[1]
        # A component of a rank-deficient matrix contributes nothing on either side.
        present = size > ZERO_COMPONENT * size.max(initial=0.0)
        ratio = np.sqrt(np.where(present, norms[1], 1.0) / np.where(present, norms[0], 1.0))
        ratio, inverse = np.where(present, ratio, 0.0), np.where(present, 1 / ratio, 0.0)
        return up * ratio, inverse[:, None] * down

    def truncated(self, rank: int) -> np.ndarray:
        """The best rank-r approximation multiplied out, (m, n) float64.

        Above half of full rank it is cheaper to subtract the dropped part.
        """
        if 2 * rank > len(self.energies):
            up, down = self.dropped(rank)
            return self.weight - up @ down
        up, down = self.factors(rank)
        return up @ down


def decompose(weight: np.ndarray, metric: Metric | None = None) -> Decomposition:
    """Eigen-decomposition of the smaller Gram matrix of an (m, n) matrix, in float64.

    metric: in which the approximations are the best ones; None: Frobenius norm. Costs about what
    one SVD of a square matrix costs, and 18 times less than one for 512 x 3584. Raises
    numpy.linalg.LinAlgError when LAPACK does not converge (NaN in the input).
    """
    weight = weight.astype(np.float64, copy=False)
    if metric is not None:
        return _decompose_in(metric, weight)
    eigenvalues, vectors = np.linalg.eigh(gram(weight))
    left = weight.shape[0] <= weight.shape[1]
    return Decomposition(weight, vectors[:, ::-1], energies_of(eigenvalues), left)


def _decompose_in(metric: Metric, weight: np.ndarray) -> Decomposition:
    scaled = metric.scaled(weight)
    if weight.shape[0] <= weight.shape[1]:
        eigenvalues, vectors = np.linalg.eigh(metric.output_gram(scaled))
        basis = vectors[:, ::-1]
    else:
        weighted = metric.times_right_root(scaled)
        eigenvalues, vectors = np.linalg.eigh(weighted.T @ weighted)
        # Left vectors in order; QR keeps them orthonormal where singular values vanish.
        basis = np.linalg.qr(weighted @ vectors[:, ::-1])[0]
    energies = metric.unit * energies_of(eigenvalues)
    return Decomposition(weight, basis, energies, True, metric)


def reordered(d: Decomposition, scores: np.ndarray) -> Decomposition:
    """The same components, those with the highest ``scores`` (k,) kept first."""
    order = np.argsort(-scores, kind="stable")
    return Decomposition(d.weight, d.basis[:, order], scores[order], d.left, d.metric)
