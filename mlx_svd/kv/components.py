"""Ordered components of keys and of values: bases of every rank, cut from one decomposition.

For a group of heads the vectors x (columns: the heads of one token, side by side) are encoded as
z = Eᵀ (x - mean) and decoded as Dᵀ z + mean. The first r columns of E and rows of D are the rank-r
basis. With covariance C of x and a weight L of the errors, E D is the best rank-r map:
with P the top eigenvectors of L^1/2 C L^1/2, E = L^1/2 P and D = Pᵀ L^-1/2 minimize
E ||L^1/2 (x - decoded)||².

- ``pca``: L = 1.
- ``kq``: L = E[sum of q qᵀ], so the error is that of the scores q·k: the optimum of KQ-SVD
  (arXiv 2512.05916), which its paper states for one head as the truncated SVD of K Qᵀ.
- ``joint``: P from the covariance of keys plus the moment of queries, the stacked [K; Q] of Eigen
  Attention (arXiv 2408.05646); L = 1 otherwise.
- ``output`` (values): L = sum of W_oᵀ W_o over the query heads that read the value.

Keys are centred for nothing: a constant added to all keys shifts all scores of a query alike, and
softmax does not see it. For values the constant is kept, because weights of softmax add up to 1.
"""

from dataclasses import dataclass

import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.moments import LayerMoments

KEY_KINDS, VALUE_KINDS = ("pca", "joint", "kq"), ("pca", "output")
# Smallest eigenvalue of a weight, as a share of its largest: a direction that no query uses keeps
# a little weight, so that L^-1/2 exists and full rank is exact.
_FLOOR = 1e-8


@dataclass(frozen=True)
class Components:
    """energies (G, n) descending, in the metric of the kind; encode (G, n, n); decode (G, n, n);
    mean (G, n), of G groups of n = heads-per-group * head_dim dimensions. weighted: L is not 1."""

    energies: np.ndarray
    encode: np.ndarray
    decode: np.ndarray
    mean: np.ndarray
    weighted: bool = False


def check_grouping(n_kv_heads: int, heads_per_group: int | None) -> int:
    """Heads in a group (None: all of them); MlxSvdError if they do not divide the heads."""
    group = heads_per_group or n_kv_heads
    if group < 1 or n_kv_heads % group:
        raise MlxSvdError(
            f"--kv-group {group}: does not divide the model's {n_kv_heads} key-value heads; give "
            "a divisor or all"
        )
    return group


def key_components(moments: LayerMoments, kind: str, heads_per_group: int | None) -> Components:
    """Components of the keys as cached."""
    if kind not in KEY_KINDS:
        raise MlxSvdError(f"--kv-keys {kind}: use {', '.join(KEY_KINDS)}")
    covariance, weight = moments.second("K", centred=True), None
    metric = covariance
    if kind == "joint":
        metric = covariance + moments.queries
    elif kind == "kq":
        weight = _block_diagonal(moments.queries, moments.heads[1])
    return _components(metric, weight, moments.key_mean, moments, heads_per_group)


def value_components(
    moments: LayerMoments, kind: str, heads_per_group: int | None, output: np.ndarray
) -> Components:
    """Components of the values; output: weight (m, Hq d) of the output projection."""
    if kind not in VALUE_KINDS:
        raise MlxSvdError(f"--kv-values {kind}: use {', '.join(VALUE_KINDS)}")
    size = len(moments.key_mean)
    weight = output_weight(moments, output) if kind == "output" else None
    covariance = moments.second("V", centred=True)
    return _components(covariance, weight, moments.joint_mean[size:], moments, heads_per_group)


def output_weight(moments: LayerMoments, output: np.ndarray) -> np.ndarray:
    """(D, D) block-diagonal: what an error of a value costs at the attention's output, summed over
    the query heads that read it."""
    n_heads, n_kv_heads = moments.heads
    weight = np.zeros((len(moments.key_mean),) * 2)
    heads = output.astype(np.float64).reshape(len(output), n_heads, -1)
    for head in range(n_heads):
        at = head * n_kv_heads // n_heads * moments.head_dim
        block = slice(at, at + moments.head_dim)
        weight[block, block] += heads[:, head].T @ heads[:, head]
    return weight


def _block_diagonal(matrix: np.ndarray, blocks: int) -> np.ndarray:
    size = len(matrix) // blocks
    mask = np.kron(np.eye(blocks), np.ones((size, size)))
    return matrix * mask


def _components(
    second: np.ndarray,
    weight: np.ndarray | None,
    mean: np.ndarray,
    moments: LayerMoments,
    heads_per_group: int | None,
) -> Components:
    size = check_grouping(moments.heads[1], heads_per_group) * moments.head_dim
    parts = []
    for start in range(0, len(mean), size):
        block = slice(start, start + size)
        part = None if weight is None else weight[block, block]
        parts.append(decompose(second[block, block], part))
    energies, encode, decode = (np.stack(column) for column in zip(*parts, strict=True))
    return Components(energies, encode, decode, mean.reshape(len(parts), size), weight is not None)


def decompose(
    second: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(energies (n,), encode (n, n), decode (n, n)) of a second moment and a weight, (n, n)."""
    if weight is None:
        root = inverse = np.eye(len(second))
    else:
        values, vectors = np.linalg.eigh(weight)
        values = np.sqrt(np.maximum(values, max(values[-1], 1e-300) * _FLOOR))
        root, inverse = (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
    energies, basis = np.linalg.eigh(root @ second @ root)
    basis = basis[:, ::-1]
    return np.maximum(energies[::-1], 0.0), root @ basis, basis.T @ inverse
