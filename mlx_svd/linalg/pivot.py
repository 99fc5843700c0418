"""A rank-r matrix as r of its own rows and the coefficients of the others.

PIFA (Zhao et al., arXiv 2501.19090): r n + (m - r) r numbers, fewer than the m n of the dense
matrix for every r < min(m, n). The rows must be chosen by QR with column pivoting: the pivots of
LU give coefficients so large that half precision loses the matrix.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from mlx_svd.linalg.truncate import Decomposition


@dataclass(frozen=True)
class PivotForm:
    """rows (r, n): the pivot rows; coefficients (m - r, r): the other rows in terms of them;
    order (m,): output i is entry order[i] of [rows x, coefficients (rows x)]."""

    rows: np.ndarray
    coefficients: np.ndarray
    order: np.ndarray

    def dense(self) -> np.ndarray:
        """The matrix multiplied out, (m, n)."""
        return np.concatenate([self.rows, self.coefficients @ self.rows])[self.order]


def pivot_form(d: Decomposition, rank: int) -> PivotForm:
    """The pivot form of the best rank-r approximation of an (m, n) matrix, r <= m, float64.

    The pivots are chosen on an orthonormal basis of the column space, so a rank-deficient matrix
    (zeros, say) is represented exactly too. Above half of full rank they are chosen on its
    orthogonal complement T instead, which is smaller: the rows that are no pivots of the one are
    pivots of the other, because complementary minors of an orthogonal matrix are equal.
    """
    if d.complete and 2 * rank > len(d.basis):
        complement = d.dropped_space(rank)
        others, chosen, solved = _pivots(complement)
        # T_o^T W_o + T_s^T W_s = 0 for the pivot rows s and the others o.
        up, down = d.dropped(rank)
        return PivotForm(d.weight[chosen] - up[chosen] @ down, -solved, _order(chosen, others))
    up, down = d.factors(rank)
    orthonormal = d.complete and d.metric is None
    basis, triangle = (up, None) if orthonormal else np.linalg.qr(up)
    chosen, others, solved = _pivots(basis)
    rows = basis[chosen] @ (down if orthonormal else triangle @ down)
    return PivotForm(rows, solved.T, _order(chosen, others))


def _pivots(basis: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of an orthonormal (m, k) that span all others: their indices, those of the others
    (both ascending), and X (k, m - k) with B_others^T = B_pivots^T X."""
    k = basis.shape[1]
    triangle, permutation = scipy.linalg.qr(basis.T, mode="r", pivoting=True, check_finite=False)
    solved = scipy.linalg.solve_triangular(triangle[:, :k], triangle[:, k:], check_finite=False)
    first, rest = np.argsort(permutation[:k]), np.argsort(permutation[k:])
    return permutation[:k][first], permutation[k:][rest], solved[first][:, rest]


def _order(chosen: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Where each output is in [pivot rows, other rows]."""
    order = np.empty(len(chosen) + len(others), dtype=np.uint32)
    order[chosen] = np.arange(len(chosen))
    order[others] = np.arange(len(chosen), len(order))
    return order
