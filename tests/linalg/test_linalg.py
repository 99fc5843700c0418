"""Spectra, truncation, gauges and the pivot form against numpy's SVD."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_svd.linalg.pivot import pivot_form
from mlx_svd.linalg.rotate import random_orthogonal, rotate
from mlx_svd.linalg.spectrum import component_energies, energy_kept, rank_for_energy
from mlx_svd.linalg.truncate import decompose

SHAPES = [(1, 1), (5, 40), (40, 5), (33, 33), (64, 96), (96, 64)]


def matrix(m: int, n: int, decay: float = 0.5, seed: int = 0) -> np.ndarray:
    """A random matrix whose singular values fall as i^-decay."""
    rng = np.random.default_rng(seed)
    u, _, v = np.linalg.svd(rng.standard_normal((m, n)), full_matrices=False)
    return (u * np.arange(1, min(m, n) + 1) ** -decay) @ v


def best(weight: np.ndarray, rank: int) -> np.ndarray:
    """numpy's best rank-r approximation."""
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("shape", SHAPES)
def test_energies_are_squared_singular_values_largest_first(shape):
    weight = matrix(*shape)
    expected = np.linalg.svd(weight, compute_uv=False) ** 2
    np.testing.assert_allclose(component_energies(weight), expected, atol=1e-12)
    np.testing.assert_allclose(decompose(weight).energies, expected, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_gauge_multiplies_to_numpys_best_approximation(shape):
    weight = matrix(*shape)
    d = decompose(weight)
    for rank in {1, min(shape) // 3 or 1, -(-2 * min(shape) // 3), min(shape)}:
        expected = best(weight, rank)
        balanced = d.balanced_factors(rank)
        for up, down in (d.factors(rank), balanced, rotate(*balanced, seed=7)):
            assert up.shape == (shape[0], rank)
            assert down.shape == (rank, shape[1])
            np.testing.assert_allclose(up @ down, expected, atol=1e-12)
        np.testing.assert_allclose(d.truncated(rank), expected, atol=1e-12)
        np.testing.assert_allclose(pivot_form(d, rank).dense(), expected, atol=1e-12)


def test_balanced_factors_share_the_singular_values_equally_and_nest():
    weight = matrix(30, 50)
    sigma = np.linalg.svd(weight, compute_uv=False)
    up, down = decompose(weight).balanced_factors(20)
    np.testing.assert_allclose((up**2).sum(axis=0), sigma[:20], atol=1e-10)
    np.testing.assert_allclose((down**2).sum(axis=1), sigma[:20], atol=1e-10)
    smaller_up, smaller_down = decompose(weight).balanced_factors(8)
    np.testing.assert_array_equal(up[:, :8], smaller_up)
    np.testing.assert_allclose(down[:8], smaller_down, atol=1e-14)


def test_rotation_is_orthogonal_and_depends_on_the_seed_only():
    q = random_orthogonal(24, seed=3)
    np.testing.assert_allclose(q @ q.T, np.eye(24), atol=1e-12)
    np.testing.assert_array_equal(q, random_orthogonal(24, seed=3))
    assert np.abs(q - random_orthogonal(24, seed=4)).max() > 0.1


@pytest.mark.parametrize("rank", [5, 40, 60, 90])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_pivot_coefficients_stay_small_whatever_the_spectrum(decay, rank):
    form = pivot_form(decompose(matrix(96, 128, decay)), rank)
    assert np.abs(form.coefficients).max() < 2.0
    assert sorted(form.order.tolist()) == list(range(96))


def test_pivot_rows_are_rows_of_the_approximation_itself():
    weight = matrix(40, 60)
    form = pivot_form(decompose(weight), 10)
    expected = best(weight, 10)
    chosen = [i for i in range(40) if form.order[i] < 10]
    np.testing.assert_allclose(form.rows, expected[chosen], atol=1e-12)
    assert form.rows.size + form.coefficients.size == 10 * (40 + 60 - 10)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("true_rank", [0, 2])
def test_rank_deficient_matrices_are_represented_exactly(shape, true_rank):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((shape[0], true_rank)) @ rng.standard_normal((true_rank, shape[1]))
    d = decompose(weight)
    for rank in (3, 5):
        up, down = d.balanced_factors(rank)
        np.testing.assert_allclose(up @ down, weight, atol=1e-12)
        np.testing.assert_allclose(pivot_form(d, rank).dense(), weight, atol=1e-12)


def test_outliers_do_not_spoil_the_tail():
    weight = matrix(64, 64, decay=0.75)
    u, s, v = np.linalg.svd(weight)
    s[:4] *= [60, 30, 15, 8]
    weight = (u * s) @ v
    for rank in (8, 32, 56):
        error = np.linalg.norm(weight - decompose(weight.astype(np.float32)).truncated(rank))
        assert error / np.linalg.norm(s[rank:]) - 1 <= 1e-5


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.floats(1e-6, 1))
def test_rank_for_energy_is_the_smallest_that_keeps_the_share(values, share):
    energies = np.sort(np.array(values))[::-1]
    rank = rank_for_energy(energies, share)
    assert 1 <= rank <= len(energies)
    assert energy_kept(energies, rank) >= share * (1 - 1e-9)
    if rank > 1:
        assert energy_kept(energies, rank - 1) < share


def test_nan_raises_instead_of_giving_a_result():
    weight = matrix(8, 8)
    weight[3, 3] = np.nan
    with pytest.raises(np.linalg.LinAlgError):
        decompose(weight)
