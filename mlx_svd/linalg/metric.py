"""What an error of a weight matrix costs: ``unit * ||L^1/2 E R^1/2||_F^2``.

L (m, m) weighs the outputs and R (n, n) the inputs; each may also be diagonal, given as a vector,
or None for the identity. With R = E[x x^T] and L = E[g g^T] of the gradients g at the outputs this
is the Kronecker-factored second-order change of the loss (Martens and Grosse, arXiv 1503.05671);
with L = 1 it is the mean squared error of the output.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

# Added to each Gram matrix, as a share of its mean diagonal: a direction that calibration has not
# seen keeps a small weight of its own, so a singular Gram has an inverse root and rank k is exact.
# Output gradients are few and noisy in small directions, hence the larger share.
RIGHT_RIDGE, LEFT_RIDGE = 1e-6, 1e-3


@dataclass(frozen=True)
class Metric:
    """left: L (m, m), (m,) or None; right: R (n, n), (n,) or None; unit: factor of the loss;
    ridged: the ridges are in left and right already."""

    left: np.ndarray | None = None
    right: np.ndarray | None = None
    unit: float = 1.0
    ridged: bool = False

    def __post_init__(self):
        if self.ridged:
            return
        object.__setattr__(self, "ridged", True)
        for name, ridge in (("left", LEFT_RIDGE), ("right", RIGHT_RIDGE)):
            if (gram := getattr(self, name)) is not None:
                object.__setattr__(self, name, _with_ridge(gram, ridge))

    def loss(self, error: np.ndarray) -> float:
        """unit * ||L^1/2 E R^1/2||^2 for an error (m, n)."""
        return self.unit * float((_times(self.left, error) * _times_right(error, self.right)).sum())

    def rows(self, chosen: slice) -> "Metric":
        """The metric of some of the rows, as if the others had no error."""
        left = self.left
        if left is not None:
            left = left[chosen] if left.ndim == 1 else left[chosen, chosen]
        return replace(self, left=left)

    def in_unit(self, unit: float) -> "Metric":
        """The same metric with another factor of the loss."""
        return replace(self, unit=unit)

    @cached_property
    def _roots(self) -> tuple[np.ndarray, np.ndarray] | None:
        """L^1/2 and L^-1/2; None for the identity."""
        if self.left is None:
            return None
        if self.left.ndim == 1:
            root = np.sqrt(self.left)
            return root, 1 / root
        values, vectors = np.linalg.eigh(self.left)
        root = np.sqrt(np.maximum(values, values[-1] * 1e-15))
        return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T

    def scaled(self, matrix: np.ndarray) -> np.ndarray:
        """L^1/2 M."""
        return matrix if self._roots is None else _times(self._roots[0], matrix)

    def unscaled(self, matrix: np.ndarray) -> np.ndarray:
        """L^-1/2 M."""
        return matrix if self._roots is None else _times(self._roots[1], matrix)

    def output_gram(self, scaled: np.ndarray) -> np.ndarray:
        """A R A^T for A = L^1/2 W (m, n): (m, m)."""
        return _times_right(scaled, self.right) @ scaled.T

    def times_right_root(self, scaled: np.ndarray) -> np.ndarray:
        """A R^1/2, (m, n)."""
        if self.right is None or self.right.ndim == 1:
            return scaled if self.right is None else scaled * np.sqrt(self.right)
        values, vectors = np.linalg.eigh(self.right)
        return (scaled @ vectors) * np.sqrt(np.maximum(values, 0.0)) @ vectors.T


def _with_ridge(gram: np.ndarray, ridge: float) -> np.ndarray:
    """float64, with ``ridge`` times the mean diagonal added; all ones for a Gram of zeros."""
    gram = gram.astype(np.float64)
    diagonal = gram if gram.ndim == 1 else np.diagonal(gram)
    amount = ridge * float(diagonal.mean()) or 1.0
    return gram + (amount if gram.ndim == 1 else amount * np.eye(len(gram)))


def _times(left: np.ndarray | None, matrix: np.ndarray) -> np.ndarray:
    if left is None:
        return matrix
    return left[:, None] * matrix if left.ndim == 1 else left @ matrix


def _times_right(matrix: np.ndarray, right: np.ndarray | None) -> np.ndarray:
    if right is None:
        return matrix
    return matrix * right if right.ndim == 1 else matrix @ right
