"""Value bases, rotary pairs and neurons against explicit samples and brute force."""

from itertools import combinations

import numpy as np
import pytest

from mlx_svd.linalg import slicing

M, HEADS, KV_HEADS, SIZE = 20, 4, 2, 6
SAMPLES = 400


def correlated(n: int, seed: int) -> np.ndarray:
    """Samples (SAMPLES, n) with decaying, rotated covariance and a mean."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((n, n)) * np.arange(1, n + 1) ** -0.7
    return rng.standard_normal((SAMPLES, n)) @ mix.T + rng.standard_normal(n)


def positive(n: int, seed: int) -> np.ndarray:
    root = correlated(n, seed)
    return root.T @ root / SAMPLES


def moment(samples: np.ndarray) -> np.ndarray:
    return samples.T @ samples / len(samples)


def output_loss(weight, projectors, inputs, left) -> float:
    """E ||L^1/2 sum_h O_h (I - P_g(h)) a_h||^2, every head's error on its own."""
    size, total = projectors[0].shape[0], 0.0
    for h in range(weight.shape[1] // size):
        columns = slice(h * size, (h + 1) * size)
        missed = np.eye(size) - projectors[h // (HEADS // KV_HEADS)]
        errors = inputs[:, columns] @ missed.T @ weight[:, columns].T
        total += np.einsum("si,ij,sj->", errors, left, errors) / len(inputs)
    return float(total)


def grouped_loss(weight, projectors, inputs, left) -> float:
    """sum over the groups of tr(G (I - P) A (I - P)^T), which ``head_bases`` minimizes."""
    size, total = projectors[0].shape[0], 0.0
    for g, projector in enumerate(projectors):
        columns = [slice(h * size, (h + 1) * size) for h in (2 * g, 2 * g + 1)]
        gram = sum(weight[:, c].T @ left @ weight[:, c] for c in columns)
        seen = sum(moment(inputs[:, c]) for c in columns)
        missed = np.eye(size) - projector
        total += np.trace(gram @ missed @ seen @ missed.T)
    return float(total)


def bases(weight, inputs, left, rank, heads=HEADS, kv_heads=KV_HEADS):
    return slicing.head_bases(weight, moment(inputs), left, heads, kv_heads, rank)


@pytest.fixture
def output():
    """weight (M, H d), inputs (SAMPLES, H d), left (M, M)."""
    weight = np.random.default_rng(0).standard_normal((M, HEADS * SIZE))
    return weight, correlated(HEADS * SIZE, 1), positive(M, 2)


@pytest.mark.parametrize("weighted", [True, False])
def test_all_value_dimensions_kept_is_the_identity(output, weighted):
    weight, inputs, left = output
    for basis in bases(weight, inputs, left if weighted else None, SIZE):
        np.testing.assert_allclose(basis.up @ basis.down, np.eye(SIZE), atol=1e-9)
        assert basis.kept == 1.0


@pytest.mark.parametrize("rank", range(1, SIZE))
def test_value_basis_is_a_projector_of_its_rank(output, rank):
    for basis in bases(*output, rank):
        assert (basis.down.shape, basis.up.shape) == ((rank, SIZE), (SIZE, rank))
        np.testing.assert_allclose(basis.down @ basis.up, np.eye(rank), atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_energy_that_a_value_basis_leaves_out_is_the_weighted_loss(output, rank):
    weight, inputs, left = output
    for g in range(KV_HEADS):
        columns = slice(2 * g * SIZE, 2 * (g + 1) * SIZE)
        own, seen = weight[:, columns], inputs[:, columns]
        basis = bases(own, seen, left, rank, 2, 1)[0]
        zero = np.zeros((SIZE, SIZE))
        pair = (own, [basis.up @ basis.down], seen, left)
        total = grouped_loss(own, [zero], seen, left)
        assert grouped_loss(*pair) == pytest.approx((1 - basis.kept) * total, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_no_projector_of_the_same_rank_loses_less(output, rank):
    weight, inputs, left = output
    best = [b.up @ b.down for b in bases(*output, rank)]
    least = grouped_loss(weight, best, inputs, left)
    rng = np.random.default_rng(3)
    for scale in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            others = []
            for b in bases(*output, rank):
                up = b.up + scale * rng.standard_normal(b.up.shape)
                down = b.down + scale * rng.standard_normal(b.down.shape)
                others.append(up @ np.linalg.solve(down @ up, down))
            assert grouped_loss(weight, others, inputs, left) > least


@pytest.mark.parametrize("rank", [2, 4])
def test_value_basis_beats_the_principal_components_of_the_values(rank):
    # One head in each group, where the objective is the whole error.
    weight = np.random.default_rng(4).standard_normal((M, 2 * SIZE)) * np.tile(
        np.arange(1, SIZE + 1) ** 2.0, 2
    )
    inputs, left = correlated(2 * SIZE, 5), positive(M, 6)
    found = slicing.head_bases(weight, moment(inputs), left, 2, 2, rank)
    plain = []
    for h in range(2):
        _, vectors = np.linalg.eigh(moment(inputs[:, h * SIZE : (h + 1) * SIZE]))
        plain.append(vectors[:, -rank:] @ vectors[:, -rank:].T)

    def loss(projectors):
        total = 0.0
        for h, projector in enumerate(projectors):
            columns = slice(h * SIZE, (h + 1) * SIZE)
            missed = np.eye(SIZE) - projector
            errors = inputs[:, columns] @ missed.T @ weight[:, columns].T
            total += np.einsum("si,ij,sj->", errors, left, errors)
        return total

    assert loss([b.up @ b.down for b in found]) < 0.9 * loss(plain)


def test_weight_of_the_output_error_changes_the_basis_for_the_better(output):
    weight, inputs, left = output
    left = left @ left  # far from the identity
    one = [b.up @ b.down for b in bases(weight, inputs, left, 3)]
    other = [b.up @ b.down for b in bases(weight, inputs, None, 3)]
    assert output_loss(weight, one, inputs, left) < output_loss(weight, other, inputs, left)
    identity = np.eye(M)
    assert output_loss(weight, one, inputs, identity) > output_loss(weight, other, inputs, identity)


def test_value_basis_does_not_depend_on_the_signs_that_lapack_gives(output, monkeypatch):
    weight, inputs, left = output
    expected = bases(weight, inputs, left, 4)
    eigh = np.linalg.eigh

    def flipped(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * np.where(np.arange(len(values)) % 2, 1.0, -1.0)

    monkeypatch.setattr(np.linalg, "eigh", flipped)
    for one, other in zip(bases(weight, inputs, left, 4), expected, strict=True):
        np.testing.assert_allclose(one.down, other.down, atol=1e-9)
        np.testing.assert_allclose(one.up, other.up, atol=1e-9)


def test_dead_value_dimension_and_dead_head_are_exact_at_the_remaining_rank():
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((M, 2 * SIZE))
    weight[:, 2] = 0.0
    weight[:, SIZE:] = 0.0
    inputs = correlated(2 * SIZE, 8)
    found = slicing.head_bases(weight, moment(inputs), None, 2, 2, SIZE - 1)
    for h, basis in enumerate(found):
        columns = slice(h * SIZE, (h + 1) * SIZE)
        kept = weight[:, columns] @ basis.up @ basis.down
        np.testing.assert_allclose(kept, weight[:, columns], atol=1e-5)


@pytest.mark.parametrize("bias", [None, np.linspace(-1, 1, 8)])
def test_output_second_is_that_of_the_samples(bias):
    weight, inputs = np.random.default_rng(9).standard_normal((8, 5)), correlated(5, 10)
    outputs = inputs @ weight.T + (0 if bias is None else bias)
    found = slicing.output_second(weight, bias, moment(inputs), inputs.mean(0))
    np.testing.assert_allclose(found, moment(outputs), rtol=1e-10, atol=1e-12)


def test_pair_scores_are_sums_over_heads_of_the_energies_of_both_dimensions():
    queries, keys = np.arange(1.0, 25.0), np.arange(1.0, 13.0)  # 4 heads of 6, 2 KV heads
    scores = slicing.pair_scores(queries, keys, 2)
    assert scores.shape == (3,)
    for j in range(3):
        expected = sum(
            (queries[6 * h + j] + queries[6 * h + j + 3])
            * (keys[6 * (h // 2) + j] + keys[6 * (h // 2) + j + 3])
            for h in range(4)
        )
        assert scores[j] == pytest.approx(expected)


def test_energy_of_an_attention_score_is_what_its_pairs_add():
    # Independent pairs of equal variance in both dimensions: E (q^T R k)^2 is a sum over pairs.
    rng = np.random.default_rng(11)
    size, scale = 8, np.tile([3.0, 0.1, 1.0, 2.0], 2)
    q, k = (rng.standard_normal((200_000, size)) * scale for _ in range(2))
    angle = np.linspace(0.3, 2.0, 4)
    turned = np.concatenate(
        [
            k[:, :4] * np.cos(angle) - k[:, 4:] * np.sin(angle),
            k[:, 4:] * np.cos(angle) + k[:, :4] * np.sin(angle),
        ],
        1,
    )
    scores = slicing.pair_scores((q**2).mean(0), (k**2).mean(0), 1)
    for j in range(4):
        added = (q[:, [j, j + 4]] * turned[:, [j, j + 4]]).sum(1)
        assert (added**2).mean() == pytest.approx(scores[j] / 2, rel=0.02)


def test_pair_rows_keep_both_halves_of_every_head():
    rows = slicing.pair_rows(np.array([0, 2]), 6, 3)
    assert rows.tolist() == [0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17]


@pytest.mark.parametrize("weighted", [True, False])
def test_pair_costs_add_up_to_what_zero_outputs_cost_on_samples(weighted):
    outputs, left = correlated(24, 27), positive(24, 28) if weighted else None  # 3 heads of 8
    costs = slicing.pair_costs(moment(outputs), left, 3)
    for dropped in ([1], [0, 3], [0, 1, 2, 3]):
        rows = slicing.pair_rows(np.array(dropped), 8, 3)
        zeroed = np.zeros_like(outputs)
        zeroed[:, rows] = outputs[:, rows]
        weight = np.eye(24) if left is None else left
        expected = np.einsum("si,ij,sj->", zeroed, weight, zeroed) / SAMPLES
        if left is None:
            expected = (zeroed**2).sum() / SAMPLES
        assert costs[np.ix_(dropped, dropped)].sum() == pytest.approx(expected)


def test_pairs_are_dropped_where_the_sum_grows_least():
    costs = positive(6, 29)
    order, dropped = slicing.dropping_order(costs), []
    for j in order:
        sums = {
            i: costs[np.ix_([*dropped, i], [*dropped, i])].sum()
            for i in set(range(6)) - set(dropped)
        }
        assert j == min(sums, key=sums.get)
        dropped.append(int(j))
    assert sorted(dropped) == list(range(6))


def test_largest_is_ascending_and_stable():
    assert slicing.largest(np.array([1.0, 5.0, 5.0, 0.0, 5.0]), 2).tolist() == [1, 2]


def test_all_neurons_kept_is_the_down_projection_itself():
    down = np.random.default_rng(12).standard_normal((7, 10))
    second = moment(correlated(10, 13)[:5])  # singular
    np.testing.assert_allclose(slicing.nystrom(down, second, np.arange(10)), down, atol=1e-8)


def test_nystrom_is_the_regression_on_the_kept_neurons(monkeypatch):
    monkeypatch.setattr(slicing, "NEURON_RIDGE", 1e-12)
    down, hidden = np.random.default_rng(14).standard_normal((7, 10)), correlated(10, 15)
    kept = np.array([1, 4, 5, 8])
    expected = np.linalg.lstsq(hidden[:, kept], hidden @ down.T, rcond=None)[0].T
    found = slicing.nystrom(down, moment(hidden), kept)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weighted", [True, False])
def test_score_of_a_neuron_is_what_leaving_it_out_costs(weighted, monkeypatch):
    monkeypatch.setattr(slicing, "NEURON_RIDGE", 1e-12)
    down, hidden = np.random.default_rng(16).standard_normal((9, 7)), correlated(7, 17)
    left = positive(9, 18) if weighted else None
    second, found = moment(hidden), []
    for i in range(7):
        kept = np.delete(np.arange(7), i)
        error = hidden @ down.T - hidden[:, kept] @ slicing.nystrom(down, second, kept).T
        found.append(np.einsum("si,ij,sj->", error, left if weighted else np.eye(9), error))
    scores = slicing.neuron_scores(down, np.linalg.inv(second), left)
    np.testing.assert_allclose(scores, np.array(found) / SAMPLES, rtol=1e-4)


def test_chosen_neurons_lose_little_more_than_the_best_subset():
    down, hidden = np.random.default_rng(19).standard_normal((9, 8)), correlated(8, 20)
    second, left = moment(hidden), positive(9, 21)

    def loss(kept):
        error = hidden @ down.T - hidden[:, kept] @ slicing.nystrom(down, second, kept).T
        return np.einsum("si,ij,sj->", error, left, error)

    losses = sorted(loss(np.array(kept)) for kept in combinations(range(8), 4))
    chosen = loss(slicing.kept_neurons(down, second, left, [4])[4])
    assert chosen <= losses[len(losses) // 10]
    at_once = loss(slicing.largest(slicing.neuron_scores(down, np.linalg.inv(second), left), 4))
    assert chosen < at_once


def test_of_two_equal_neurons_one_is_kept():
    hidden = correlated(6, 22)
    hidden[:, 3] = hidden[:, 1]
    down = np.random.default_rng(23).standard_normal((5, 6))
    kept = slicing.kept_neurons(down, moment(hidden), None, [5])[5]
    assert len({1, 3} & set(kept.tolist())) == 1
    error = hidden @ down.T - hidden[:, kept] @ slicing.nystrom(down, moment(hidden), kept).T
    assert np.abs(error).max() <= 1e-2 * np.abs(hidden @ down.T).max()


def test_neurons_are_left_out_one_after_the_other_with_new_readers(monkeypatch):
    monkeypatch.setattr(slicing, "_ROUNDS", 8)
    down, hidden = np.random.default_rng(24).standard_normal((9, 8)), correlated(8, 25)
    second, left = moment(hidden), positive(9, 26)
    kept, reader = np.arange(8), down
    found = slicing.kept_neurons(down, second, left, range(1, 8))
    for size in range(7, 0, -1):
        inverse = np.linalg.inv(slicing._ridged(second)[np.ix_(kept, kept)])
        worst = np.argmin(slicing.neuron_scores(reader, inverse, left))
        kept = np.delete(kept, worst)
        reader = slicing.nystrom(down, second, kept)
        assert found[size].tolist() == kept.tolist()
    alone = slicing.kept_neurons(down, second, left, [3])[3]
    assert alone.tolist() == found[3].tolist()
