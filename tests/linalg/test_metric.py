"""Losses and best approximations in a metric against Cholesky factors and numpy's SVD."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_svd.linalg.metric import LEFT_RIDGE, RIGHT_RIDGE, Metric
from mlx_svd.linalg.pivot import pivot_form
from mlx_svd.linalg.truncate import decompose

SHAPES = [(1, 1), (7, 30), (30, 7), (24, 24)]
KINDS = ["full", "diagonal", "none"]


def gram(size: int, samples: int, seed: int) -> np.ndarray:
    """Mean outer product of correlated samples whose scales differ by a factor of 100."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, size)) @ rng.standard_normal((size, size))
    x *= np.logspace(-1, 1, size)
    return x.T @ x / samples


def sides(m: int, n: int, left: str, right: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    made = {}
    for seed, (kind, size) in enumerate(((left, m), (right, n))):
        full = gram(size, 3 * size, seed)
        made[seed] = {"full": full, "diagonal": np.diagonal(full).copy(), "none": None}[kind]
    return made[0], made[1]


def ridged(side: np.ndarray | None, size: int, share: float) -> np.ndarray:
    """The full matrix that a side stands for, with the ridge that the module promises."""
    if side is None:
        return np.eye(size)
    full = np.diag(side) if side.ndim == 1 else side
    return full + (share * np.trace(full) / size or 1.0) * np.eye(size)


def reference(weight, left, right) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A = Cl^T W Cr, and the two triangular factors: the metric's norm is A's Frobenius norm."""
    m, n = weight.shape
    cl = np.linalg.cholesky(ridged(left, m, LEFT_RIDGE))
    cr = np.linalg.cholesky(ridged(right, n, RIGHT_RIDGE))
    return cl.T @ weight @ cr, cl, cr


def best(weight, left, right, rank: int) -> np.ndarray:
    """The optimum with explicit inverses: Cl^-T (A)_r Cr^-1."""
    scaled, cl, cr = reference(weight, left, right)
    u, s, v = np.linalg.svd(scaled, full_matrices=False)
    truncated = (u[:, :rank] * s[:rank]) @ v[:rank]
    return np.linalg.solve(cr.T, np.linalg.solve(cl.T, truncated).T).T


def weight_of(shape, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("right", KINDS)
@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_the_frobenius_norm_between_cholesky_factors(shape, left, right):
    left, right = sides(*shape, left, right)
    error = weight_of(shape)
    expected = 0.7 * np.linalg.norm(reference(error, left, right)[0]) ** 2
    assert Metric(left, right, 0.7).loss(error) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("right", KINDS)
@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank_is_the_optimum_with_explicit_inverse_roots(shape, left, right):
    left, right = sides(*shape, left, right)
    weight, metric = weight_of(shape), Metric(left, right, 0.3)
    d = decompose(weight, metric)
    tails = 0.3 * np.linalg.svd(reference(weight, left, right)[0], compute_uv=False) ** 2
    np.testing.assert_allclose(d.energies, tails, rtol=1e-7, atol=1e-10 * tails[0])
    for rank in range(1, min(shape) + 1):
        expected = best(weight, left, right, rank)
        np.testing.assert_allclose(d.truncated(rank), expected, atol=1e-6)
        up, down = d.factors(rank)
        assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
        np.testing.assert_allclose(up @ down, expected, atol=1e-6)
        lost = metric.loss(weight - d.truncated(rank))
        assert lost == pytest.approx(tails[rank:].sum(), rel=1e-6, abs=1e-9 * tails[0])
    np.testing.assert_allclose(d.truncated(min(shape)), weight, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 20), st.data())
def test_ranks_nest_and_no_other_matrix_of_the_rank_is_better(m, n, samples, data):
    rank = data.draw(st.integers(1, min(m, n)))
    metric = Metric(gram(m, samples, 1), gram(n, samples, 2))  # singular for few samples
    weight = weight_of((m, n))
    d = decompose(weight, metric)
    up, down = d.factors(min(m, n))
    fewer_up, fewer_down = d.factors(rank)
    np.testing.assert_allclose(up[:, :rank], fewer_up, atol=1e-12 * np.abs(up).max())
    np.testing.assert_allclose(down[:rank], fewer_down, atol=1e-12 * np.abs(down).max())
    lost = metric.loss(weight - d.truncated(rank))
    rng = np.random.default_rng(samples)
    for _ in range(5):
        other = (up[:, :rank] + 0.1 * rng.standard_normal((m, rank))) @ down[:rank]
        assert lost <= metric.loss(weight - other) * (1 + 1e-9) + 1e-12 * metric.loss(weight)
    plain = decompose(weight).truncated(rank)
    assert lost <= metric.loss(weight - plain) * (1 + 1e-9) + 1e-12 * metric.loss(weight)


def dead_channels(size: int) -> np.ndarray:
    full = gram(size, 3 * size, 3)
    full[::3] = 0
    full[:, ::3] = 0
    return full


SINGULAR = {
    "few samples": lambda size: gram(size, 3, 0),
    "dead channels": dead_channels,
    "zeros": lambda size: np.zeros((size, size)),
    "dead diagonal": lambda size: np.diagonal(dead_channels(size)).copy(),
    "zero diagonal": lambda size: np.zeros(size),
}


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("kind", SINGULAR)
def test_singular_sides_have_a_best_approximation_and_full_rank_is_exact(kind, side, shape):
    left = SINGULAR[kind](shape[0]) if side != "right" else None
    right = SINGULAR[kind](shape[1]) if side != "left" else None
    weight, metric = weight_of(shape), Metric(left, right)
    d = decompose(weight, metric)
    np.testing.assert_allclose(d.truncated(min(shape)), weight, atol=1e-9)
    up, down = d.factors(min(shape))
    np.testing.assert_allclose(up @ down, weight, atol=1e-6)
    rank = min(shape) // 2
    lost = np.linalg.svd(reference(weight, left, right)[0], compute_uv=False)[rank:] ** 2
    total = metric.loss(weight)
    assert metric.loss(weight - d.truncated(rank)) == pytest.approx(
        lost.sum(), rel=1e-5, abs=1e-9 * total
    )


def test_what_the_samples_never_use_costs_nothing_to_lose():
    """With 3 samples rank 3 keeps the outputs on them, whatever it does elsewhere."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 20))
    weight = weight_of((12, 20))
    kept = decompose(weight, Metric(right=x.T @ x / 3)).truncated(3)
    np.testing.assert_allclose(kept @ x.T, weight @ x.T, atol=1e-5)
    assert np.linalg.norm(kept - weight) > 1


@pytest.mark.parametrize("shape", [(9, 15), (15, 9)])
def test_diagonal_sides_equal_full_ones_with_diagonal_matrices(shape):
    rng = np.random.default_rng(2)
    left, right = rng.uniform(0.01, 9, shape[0]), rng.uniform(0.01, 9, shape[1])
    weight = weight_of(shape)
    vectors, full = Metric(left, right), Metric(np.diag(left), np.diag(right))
    assert vectors.loss(weight) == pytest.approx(full.loss(weight), rel=1e-12)
    one, other = decompose(weight, vectors), decompose(weight, full)
    np.testing.assert_allclose(one.energies, other.energies, rtol=1e-9)
    np.testing.assert_allclose(one.truncated(4), other.truncated(4), atol=1e-9)


def test_whitened_is_svd_llms_cholesky_form_and_loses_less_output_than_plain_svd():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((400, 32)) @ rng.standard_normal((32, 32)) * np.logspace(-1, 1, 32)
    weight, second = weight_of((24, 32)), x.T @ x / len(x)
    whitened = decompose(weight, Metric(right=second))
    for rank in (4, 12, 20):
        root = np.linalg.cholesky(second)  # SVD-LLM: SVD of W S, then multiply by S^-1
        u, s, v = np.linalg.svd(weight @ root, full_matrices=False)
        svd_llm = (u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(root)
        np.testing.assert_allclose(whitened.truncated(rank), svd_llm, atol=1e-3)
        lost = np.linalg.norm((weight - whitened.truncated(rank)) @ x.T)
        assert lost < 0.9 * np.linalg.norm((weight - decompose(weight).truncated(rank)) @ x.T)
        assert lost == pytest.approx(np.linalg.norm((weight - svd_llm) @ x.T), rel=1e-5)


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (20, 20)])
def test_pivot_form_and_balanced_factors_make_the_truncated_matrix(shape, left):
    left, right = sides(*shape, left, "full")
    d = decompose(weight_of(shape), Metric(left, right))
    for rank in (1, 6, 9, 13, 16):
        expected = d.truncated(rank)
        pivot = pivot_form(d, rank)
        assert pivot.rows.shape == (rank, shape[1])
        assert sorted(pivot.order) == list(range(shape[0]))
        np.testing.assert_allclose(pivot.dense(), expected, atol=1e-7)
        up, down = d.balanced_factors(rank)
        np.testing.assert_allclose(up @ down, expected, atol=1e-7)
        norms = np.linalg.norm(up, axis=0), np.linalg.norm(down, axis=1)
        np.testing.assert_allclose(*norms, rtol=1e-9)


def test_rows_of_a_metric_are_the_loss_of_an_error_in_these_rows_alone():
    metric = Metric(gram(12, 40, 0), gram(10, 40, 1), 0.5)
    error = weight_of((12, 10))
    for start in (0, 4, 8):
        alone = np.zeros_like(error)
        alone[start : start + 4] = error[start : start + 4]
        part = metric.rows(slice(start, start + 4))
        assert part.loss(error[start : start + 4]) == pytest.approx(metric.loss(alone), rel=1e-12)
    diagonal = Metric(np.arange(12.0), None).rows(slice(0, 1))
    ridge = LEFT_RIDGE * np.arange(12).mean()
    assert diagonal.loss(error[:1]) == pytest.approx(ridge * (error[0] ** 2).sum(), rel=1e-12)
