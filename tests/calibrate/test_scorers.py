"""Every scorer against its definition in the literature, written out with numpy's SVD."""

from dataclasses import replace

import numpy as np
import pytest

from mlx_svd.calibrate.scorers import SCORERS, Scoring, component_importance, score
from mlx_svd.calibrate.statistics import Statistics
from mlx_svd.compress import compress
from mlx_svd.errors import MlxSvdError
from mlx_svd.linalg.truncate import decompose
from mlx_svd.plan.budget import Budget
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe, Rule
from tests.calibrate.definitions import definition, seeds_importance
from tests.calibrate.material import calibrated, tiny_model

SHAPES = [(12, 20), (20, 12), (16, 16)]
IN_A_METRIC = ("activation", "fisher", "whitened", "two-sided")


def weight_of(shape) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape)


def statistics_of(m: int, n: int) -> Statistics:
    """As a calibration would measure them on 200 tokens in 8 windows."""
    rng = np.random.default_rng(m * n)
    x = rng.standard_normal((200, n)) @ rng.standard_normal((n, n)) * np.logspace(-1, 1, n)
    g = rng.standard_normal((200, m)) * np.logspace(1, -1, m)
    gradients = rng.standard_normal((8, m, n)) * rng.uniform(0.1, 3, (m, n))
    return Statistics(
        second=x.T @ x / 200,
        mean=x.mean(0),
        mean_abs=np.abs(x).mean(0),
        output_second=g.T @ g / 200,
        gradient=gradients.mean(0),
        abs_gradient=np.abs(gradients).mean(0),
        row_fisher=(gradients**2).sum(2).mean(0),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scorer", IN_A_METRIC)
def test_factors_and_costs_are_those_of_the_definition(scorer, shape):
    weight, s = weight_of(shape), statistics_of(*shape)
    left, right = definition(scorer, weight, s)
    u, sigma, v = np.linalg.svd(left @ weight @ right, full_matrices=False)
    unit = 0.5 if scorer == "two-sided" else 1 / (sigma**2).sum()
    scored = score(scorer, weight, s)
    d = scored.decompose(weight)
    # Costs come from a Gram matrix: exact to a share of the largest.
    largest = unit * sigma[0] ** 2
    np.testing.assert_allclose(d.energies, unit * sigma**2, rtol=1e-7, atol=1e-14 * largest)
    for rank in (1, 5, 8, 11):
        expected = np.linalg.solve(left, (u[:, :rank] * sigma[:rank]) @ v[:rank])
        expected = np.linalg.solve(right.T, expected.T).T
        up, down = d.factors(rank)
        np.testing.assert_allclose(up @ down, expected, atol=1e-6)
        lost = scored.loss(weight - up @ down)
        assert lost == pytest.approx(
            unit * (sigma[rank:] ** 2).sum(), rel=1e-6, abs=1e-13 * largest
        )
    assert scored.loss(weight) == pytest.approx(unit * (sigma**2).sum(), rel=1e-9)


def test_plain_is_the_svd_and_costs_squared_singular_values():
    weight = weight_of((12, 20))
    sigma = np.linalg.svd(weight, compute_uv=False)
    for s in (None, statistics_of(12, 20)):
        scored = score("plain", weight, s)
        np.testing.assert_allclose(scored.decompose(weight).energies, sigma**2, rtol=1e-9)
        assert scored.loss(weight) == pytest.approx((sigma**2).sum())
        # The inputs, if known, still serve to round by.
        assert scored.second is (None if s is None else s.second)


@pytest.mark.parametrize("shape", SHAPES)
def test_importance_is_the_sum_over_explicit_outer_products(shape):
    weight, s = weight_of(shape), statistics_of(*shape)
    scores, components = seeds_importance(weight, s.abs_gradient)
    np.testing.assert_allclose(
        component_importance(decompose(weight), s.abs_gradient), scores, rtol=1e-9
    )
    order = np.argsort(-scores)
    assert order.tolist() != sorted(order)  # the gradients do change the order
    d = score("importance", weight, s).decompose(weight)
    np.testing.assert_allclose(d.energies, scores[order], rtol=1e-9)
    for rank in range(1, min(shape) + 1):
        expected = sum(components[j] for j in order[:rank])
        np.testing.assert_allclose(d.truncated(rank), expected, atol=1e-10)
        up, down = d.balanced_factors(rank)
        np.testing.assert_allclose(up @ down, expected, atol=1e-10)
    error = weight_of(shape) / 3
    lost = score("importance", weight, s).loss(error)
    assert lost == pytest.approx((np.abs(error) * s.abs_gradient).sum(), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_seeds_window_keeps_to_the_first_components(shape):
    """Only components below 2 * rank are scored; the others are never taken."""
    u, _, v = np.linalg.svd(weight_of(shape), full_matrices=False)
    weight = (u * np.linspace(1.2, 1, len(v))) @ v
    # Gradients where the last components are: their scores are the highest.
    s = replace(statistics_of(*shape), abs_gradient=np.outer(u[:, -1] ** 4, v[-1] ** 4))
    scores, components = seeds_importance(weight, s.abs_gradient)
    scored = score("importance", weight, s, window=2)
    changed = 0
    for rank in range(1, min(shape)):
        visible = np.where(np.arange(len(scores)) < 2 * rank, scores, 0)
        taken = np.argsort(-visible, kind="stable")[:rank]
        changed += set(taken) != set(np.argsort(-scores)[:rank])
        expected = sum(components[j] for j in taken)
        np.testing.assert_allclose(
            scored.decompose(weight, rank).truncated(rank), expected, atol=1e-10
        )
    assert changed  # somewhere the window makes a difference


@pytest.mark.parametrize("scorer", IN_A_METRIC)
def test_a_head_is_scored_by_its_own_rows_in_shares_of_the_whole(scorer):
    weight, s = weight_of((12, 20)), statistics_of(12, 20)
    scored = score(scorer, weight, s)
    left, right = definition(scorer, weight, s)
    total = np.linalg.norm(left @ weight @ right) ** 2
    for start in (0, 4, 8):
        rows = slice(start, start + 4)
        head = scored.rows(rows)
        # The metric of the rows is the block of the whole metric.
        root = np.linalg.cholesky((left.T @ left)[rows, rows]).T
        u, sigma, v = np.linalg.svd(root @ weight[rows] @ right, full_matrices=False)
        unit = 0.5 if scorer == "two-sided" else 1 / total
        d = head.decompose(weight[rows])
        np.testing.assert_allclose(d.energies, unit * sigma**2, rtol=1e-7)
        expected = np.linalg.solve(root, u[:, :2] * sigma[:2] @ v[:2])
        expected = np.linalg.solve(right.T, expected.T).T
        np.testing.assert_allclose(d.truncated(2), expected, atol=1e-6)
        assert head.second is s.second


def test_a_head_has_its_own_importance():
    weight, s = weight_of((12, 20)), statistics_of(12, 20)
    head = score("importance", weight, s, window=2).rows(slice(4, 8))
    scores, components = seeds_importance(weight[4:8], s.abs_gradient[4:8])
    taken = np.argsort(-scores)[:2]
    expected = components[taken[0]] + components[taken[1]]
    d = head.decompose(weight[4:8], 2)
    np.testing.assert_allclose(d.truncated(2), expected, atol=1e-10)
    np.testing.assert_allclose(d.energies[:2], scores[taken], rtol=1e-9)
    assert head.window == 2


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_matrix_of_zeros_has_components_that_cost_nothing(scorer):
    d = score(scorer, np.zeros((12, 20)), statistics_of(12, 20)).decompose(np.zeros((12, 20)))
    np.testing.assert_allclose(d.energies, 0, atol=1e-12)
    np.testing.assert_allclose(d.truncated(3), 0, atol=1e-12)


def test_missing_moments_and_unknown_names_are_refused():
    weight, full = weight_of((12, 20)), statistics_of(12, 20)
    inputs = Statistics(full.second, full.mean, full.mean_abs)
    with pytest.raises(MlxSvdError, match="scorer 'best': use one of plain, activation, fisher"):
        score("best", weight, full)
    for scorer in set(SCORERS) - {"plain"}:
        with pytest.raises(MlxSvdError, match=f"scorer {scorer}: needs a calibration"):
            score(scorer, weight, None)
    for scorer, name in (("fisher", "gradient"), ("importance", "gradient"),
                         ("two-sided", "output")):  # fmt: skip
        with pytest.raises(MlxSvdError, match=f"scorer {scorer}: .*lacks the {name} moments"):
            score(scorer, weight, inputs)
    for scorer in ("plain", "activation", "whitened"):
        assert score(scorer, weight, inputs).second is inputs.second


def test_a_calibration_without_the_moments_or_the_projection_is_refused_by_the_plan(tmp_path):
    source, model = tiny_model("llama", tmp_path / "model")
    calibration = calibrated(source, model, tmp_path / "c", projections=("q",), moments=("input",))
    policy = RankPolicy(rank_ratio=0.5)
    with pytest.raises(MlxSvdError, match=r"c: lacks the gradient moments.*--moments input,output"):
        make_plan(source, Recipe(("q",), policy, scorer="fisher"), calibration=calibration)
    for given in (policy, RankPolicy(energy=0.9)):
        with pytest.raises(MlxSvdError, match=r"no statistics of k projections.*--projections q,k"):
            make_plan(source, Recipe(("q", "k"), given, scorer="whitened"), calibration=calibration)
    skip = (Rule(projections=("k",), skip=True),)
    plan = make_plan(
        source, Recipe(("q", "k"), policy, scorer="whitened", rules=skip), calibration=calibration
    )
    assert [p.changed for p in plan.projections if p.projection.name in "qk"] == [True, False] * 2
    for recipe in (
        Recipe(("q",), RankPolicy(energy=0.9), scorer="whitened"),
        Recipe(("q",), scorer="two-sided", budget=Budget(keep_bytes=0.5)),
    ):
        with pytest.raises(MlxSvdError, match=f"--scorer {recipe.scorer}: needs a calibration"):
            make_plan(source, recipe)


def test_given_ranks_are_planned_without_a_calibration_but_not_compressed(tmp_path):
    source, model = tiny_model("llama", tmp_path / "model")
    recipe = Recipe(("q",), RankPolicy(rank_ratio=0.5), scorer="whitened")
    plan = make_plan(source, recipe)
    with pytest.raises(MlxSvdError, match="--scorer whitened: needs a calibration"):
        compress(source, plan, tmp_path / "out")
    calibration = calibrated(source, model, tmp_path / "c", projections=("q",), moments=("input",))
    with pytest.raises(MlxSvdError, match="not the calibration that the plan was made with"):
        compress(source, plan, tmp_path / "out", calibration=calibration)
    calibrated_plan = make_plan(source, recipe, calibration=calibration)
    assert calibrated_plan.bytes_after == plan.bytes_after
    assert not (tmp_path / "out").exists()


def test_statistics_are_read_for_the_scorers_that_need_them_only(tmp_path):
    source, model = tiny_model("llama", tmp_path / "model")
    calibration = calibrated(source, model, tmp_path / "c", projections=("q",), moments=("input",))
    q, k = source.linears[0].projections[0], source.linears[1].projections[0]
    weight = weight_of(k.shape)
    assert Scoring("plain", None, calibration)(k, weight).second is None
    assert Scoring("plain", None, calibration)(q, weight_of(q.shape)).second is not None
    with pytest.raises(MlxSvdError, match="no statistics of k projections"):
        Scoring("whitened", None, calibration)(k, weight)
