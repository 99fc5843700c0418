"""Smaller dense matrices: fewer value dimensions, rotary pairs or neurons, and no extra product.

MoDeGPT (arXiv 2408.09632) cuts three pairs of matrices that have a common inner dimension:
values and output (a new basis of each head), queries and keys (some rotary pairs), and the two
sides of an MLP (some neurons). Here the basis of the values is the optimum for weighted outputs,
pairs can be chosen by what their outputs are worth, and neurons are chosen by what is lost after
the others have made up for them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mlx_svd.linalg.rotate import random_orthogonal
from mlx_svd.linalg.spectrum import energies_of, energy_kept

# Smallest eigenvalue of a Gram matrix that is inverted, as a share of its largest.
_FLOOR = 1e-12
# Added to the second moment of the neurons before it is inverted, as a share of its mean diagonal.
NEURON_RIDGE = 1e-4
_ROUNDS = 16


@dataclass(frozen=True)
class HeadBasis:
    """The kept r of the d value dimensions of one KV head.

    down: (r, d), applied to the values; up: (d, r), applied to the columns of every output head
    that reads them; up @ down: (d, d) a projector; kept: share of the weighted energy it keeps.
    """

    down: np.ndarray
    up: np.ndarray
    kept: float


def head_blocks(second: np.ndarray, heads: int) -> np.ndarray:
    """Second moment (H d, H d) of all heads -> its diagonal blocks (H, d, d), float64."""
    size = len(second) // heads
    blocks = second.reshape(heads, size, heads, size)
    return np.stack([blocks[h, :, h] for h in range(heads)]).astype(np.float64)


def head_bases(
    output: np.ndarray,
    second: np.ndarray,
    left: np.ndarray | None,
    heads: int,
    kv_heads: int,
    rank: int,
) -> list[HeadBasis]:
    """The value basis of each KV head that loses least at the output.

    output: O (m, H d), the output projection; second: E[a a^T] (H d, H d) of its input; left: L
    (m, m) weight of the output's error, None: identity; heads: H, of which each KV head serves
    H / kv_heads. With G = sum_h O_h^T L O_h and A = sum_h E[a_h a_h^T] over the heads of a group,
    the projector P of rank r that makes tr(G (I - P) A (I - P)^T) least is
    G^-1/2 U_r U_r^T G^1/2, U the eigenvectors of G^1/2 A G^1/2. It is MoDeGPT's value-output
    decomposition with one basis for each group of heads and a weight on the outputs. Raises
    numpy.linalg.LinAlgError when LAPACK does not converge.
    """
    columns = output.astype(np.float64).reshape(len(output), heads, -1)
    weighted = columns if left is None else np.einsum("ij,jhd->ihd", left, columns, optimize=True)
    grams = np.einsum("ihd,ihe->hde", columns, weighted, optimize=True)
    groups = (kv_heads, heads // kv_heads, *grams.shape[1:])
    seen = head_blocks(second, heads).reshape(groups).sum(1)
    grams = grams.reshape(groups).sum(1)
    return [_head_basis(g, a, rank) for g, a in zip(grams, seen, strict=True)]


def _head_basis(gram: np.ndarray, seen: np.ndarray, rank: int) -> HeadBasis:
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    if values[-1] <= 0:  # an output head of zeros: any basis is exact
        values = np.ones_like(values)
    root = np.sqrt(np.maximum(values, values[-1] * _FLOOR))
    half, inverse = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
    product = half @ seen @ half
    energies, basis = np.linalg.eigh((product + product.T) / 2)
    basis = _gauge(basis[:, ::-1][:, :rank])
    return HeadBasis(basis.T @ half, inverse @ basis, energy_kept(energies_of(energies), rank))


def _gauge(basis: np.ndarray) -> np.ndarray:
    """The orthonormal basis of the same space that is nearest to a fixed frame.

    Values and outputs are decomposed apart from each other: rounding may swap or flip eigenvectors
    between two runs, but it does not move the space, on which alone this basis depends.
    """
    size, rank = basis.shape
    left, _, right = np.linalg.svd(basis.T @ random_orthogonal(size, 0)[:, :rank])
    return basis @ (left @ right)


def output_second(
    weight: np.ndarray, bias: np.ndarray | None, second: np.ndarray, mean: np.ndarray
) -> np.ndarray:
    """E[y y^T] (m, m) of y = W x + b. weight: W (m, n); second: E[x x^T]; mean: E[x]."""
    weight = weight.astype(np.float64, copy=False)
    found = weight @ second @ weight.T
    if bias is not None:
        bias = bias.astype(np.float64)
        cross = np.outer(weight @ mean, bias)
        found = found + cross + cross.T + np.outer(bias, bias)
    return found


def pair_scores(queries: np.ndarray, keys: np.ndarray, kv_heads: int) -> np.ndarray:
    """Score of each rotary pair, (d / 2,).

    queries: E[q^2] (H d,); keys: E[k^2] (K d,), after the bias and before the rotation. A pair j
    adds q_j^T R k_j to an attention score, so its energy is that of the query's pair times that of
    the key's, summed over all query heads (MoDeGPT's query-key score, ||C_q^1/2[:, j]||^2
    ||C_k^1/2[:, j]||^2 with both dimensions of a pair together).
    """
    size = len(keys) // kv_heads
    of_keys = keys.reshape(kv_heads, 1, 2, size // 2).sum(2)
    of_queries = queries.reshape(kv_heads, -1, 2, size // 2).sum(2)
    return (of_queries * of_keys).sum((0, 1))


def pair_costs(second: np.ndarray, left: np.ndarray | None, heads: int) -> np.ndarray:
    """(d / 2, d / 2): the sum over D x D is what zero outputs of the pairs D cost, tr(L_DD C_DD).

    second: C = E[y y^T] (m, m) of queries or keys; left: L (m, m), None: identity.
    """
    weighed = second * (np.eye(len(second)) if left is None else left)
    half = len(second) // heads // 2
    return weighed.reshape(heads, 2, half, heads, 2, half).sum((0, 1, 3, 4))


def dropping_order(costs: np.ndarray) -> np.ndarray:
    """Pairs in the order in which they are dropped, each the one that then adds least to the sum
    of ``costs`` over the dropped ones."""
    added, order = np.diagonal(costs).copy(), []
    for _ in range(len(costs)):
        order.append(int(np.argmin(added)))
        added += 2 * costs[order[-1]]
        added[order] = np.inf
    return np.array(order)


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Ascending indices of the ``count`` largest scores; of equal ones the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def pair_rows(pairs: np.ndarray, size: int, heads: int) -> np.ndarray:
    """Rows of a query or key matrix that hold the pairs (i, i + size / 2) of every head, in the
    order in which rotary code expects them; size: d, rows of a head."""
    head = np.concatenate([pairs, pairs + size // 2])
    return (np.arange(heads)[:, None] * size + head).ravel()


def neuron_scores(
    reader: np.ndarray, inverse: np.ndarray, left: np.ndarray | None = None
) -> np.ndarray:
    """What leaving each neuron out costs when the others make up for it, (k,).

    reader: W (m, k); inverse: of C = E[h h^T] with its ridge, (k, k); left: L (m, m), None:
    identity. The score is (W^T L W)_ii / (C^-1)_ii (Optimal Brain Surgeon's saliency): what reads
    the neuron, times the part of it that the others cannot predict, MoDeGPT's ridge leverage.
    """
    weighted = reader if left is None else left @ reader
    return np.einsum("mk,mk->k", reader, weighted) / np.diagonal(inverse)


def kept_neurons(
    down: np.ndarray, second: np.ndarray, left: np.ndarray | None, sizes: Iterable[int]
) -> dict[int, np.ndarray]:
    """Size -> ascending indices of as many neurons.

    down: W (m, k); second: E[h h^T] (k, k); left: as in :func:`neuron_scores`. A sixteenth of the
    neurons goes at a time and the rest is scored anew with its new reader, because of two neurons
    that stand for each other only one may go. On three layers of a 16M model this loses 4 to 21 %
    less than one round of leverages (MoDeGPT). What a size gives does not depend on the others.
    """
    kept, reader = np.arange(len(second)), down.astype(np.float64)
    inverse, left_over = np.linalg.inv(_ridged(second)), sorted(sizes)
    found = {len(second): kept}
    for stop in np.linspace(len(second), 0, _ROUNDS + 1).round().astype(int)[1:]:
        scores = neuron_scores(reader, inverse, left)
        while left_over and left_over[-1] >= stop:
            size = left_over.pop()
            found.setdefault(size, kept[largest(scores, size)])
        if not left_over:
            break
        stay = largest(scores, stop)
        go = np.setdiff1d(np.arange(len(kept)), stay)
        # Optimal Brain Surgeon's update: the inverse of what stays, and its least-squares reader.
        taken = np.linalg.solve(inverse[np.ix_(go, go)], inverse[np.ix_(go, stay)])
        reader = reader[:, stay] - reader[:, go] @ taken
        inverse = inverse[np.ix_(stay, stay)] - inverse[np.ix_(stay, go)] @ taken
        kept = kept[stay]
    return found


def nystrom(down: np.ndarray, second: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """W C[:, S] (C[S, S] + ridge)^-1 (m, |S|): the reader of the kept neurons S that predicts
    W h best in the mean square (MoDeGPT). down: W (m, k); second: E[h h^T] (k, k)."""
    ridged = _ridged(second)
    # The ridge on both sides keeps W itself when all neurons are kept.
    right = ridged[np.ix_(kept, kept)]
    return np.linalg.solve(right, ridged[kept] @ down.astype(np.float64, copy=False).T).T


def _ridged(second: np.ndarray) -> np.ndarray:
    amount = NEURON_RIDGE * float(np.diagonal(second).mean()) or 1.0
    return second.astype(np.float64) + amount * np.eye(len(second))
