"""A rank-r matrix as r of its own rows and the coefficients of the others.

PIFA (Zhao et al., arXiv 2501.19090): r n + (m - r) r numbers, fewer than the m n of the dense
matrix for every r < min(m, n). The rows must be chosen by QR with column pivoting: the pivots of
LU give coefficients so large that half precision loses the matrix.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg


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


def pivot_form(up: np.ndarray, down: np.ndarray) -> PivotForm:
    """The pivot form of up @ down; up: (m, r), down: (r, n), r <= m, float64.

    The pivots are chosen on an orthonormal basis of up's columns, so a rank-deficient product
    (a zero matrix, say) is represented exactly too.
    """
    m, r = up.shape
    basis, triangle = np.linalg.qr(up)
    rotated, pivots = scipy.linalg.qr(basis.T, mode="r", pivoting=True, check_finite=False)
    chosen, others = np.sort(pivots[:r]), np.sort(pivots[r:])
    # rows(others) = C rows(chosen): C = R12^T R11^-T in the pivoted order, columns then sorted.
    solved = scipy.linalg.solve_triangular(rotated[:, :r], rotated[:, r:], check_finite=False)
    coefficients = solved[np.argsort(pivots[:r])][:, np.argsort(pivots[r:])].T
    order = np.empty(m, dtype=np.uint32)
    order[chosen] = np.arange(r)
    order[others] = np.arange(r, m)
    return PivotForm(basis[chosen] @ (triangle @ down), coefficients, order)
