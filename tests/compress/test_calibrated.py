"""Compression with a calibration: every scorer to the logits, compensated codes, resuming."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.calibrate.scorers import SCORERS
from mlx_svd.checkpoint.layout import Quantization
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.compress import compress
from mlx_svd.plan.budget import Budget
from mlx_svd.plan.choices import Choices
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe, Rule
from mlx_svd.source.source import open_source
from tests.calibrate.definitions import definition, optimum
from tests.calibrate.material import calibrated, random_windows, tiny_model
from tests.conftest import logits, relative_difference, source_weights
from tests.linalg.test_rounding import textbook

ATTENTION = ("q", "k", "v", "o")


class Interrupted(BaseException):
    """Stands for a signal between two units."""


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """family -> (source, calibration of all moments of q, k, v, o)."""
    made = {}

    def make(family: str):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            source, model = tiny_model(family, folder / "model")
            made[family] = source, calibrated(source, model, folder / "c", random_windows(6))
        return made[family]

    return make


def run(source, calibration, recipe: Recipe, folder, **options):
    plan = make_plan(source, recipe, calibration=calibration)
    return compress(source, plan, folder, calibration=calibration, **options), plan


def logits_with(source, weights: dict[str, np.ndarray]) -> np.ndarray:
    """Logits of the original model with other weights of its projections."""
    model = load_model(source.folder)[0]
    modules = dict(model.named_modules())
    for linear in source.linears:
        parts = {p.name: mx.array(weights[p.path].astype(np.float32)) for p in linear.projections}
        modules[linear.path].weight = linear.join(parts)
    tokens = np.random.default_rng(1).integers(0, 96, 40)
    return np.array(model(mx.array(tokens)[None])[0])


def truncated_by_hand(source, calibration, plan, scorer: str, window=None):
    weights = source_weights(source.folder)
    for p in (p for p in plan.projections if p.changed):
        (rank,) = p.ranks
        statistics = calibration.statistics(p.projection)
        weights[p.path] = optimum(scorer, weights[p.path], statistics, rank, window)
    return weights


@pytest.mark.parametrize("form", ["dense", "factored", "pivot"])
@pytest.mark.parametrize("scorer", SCORERS)
def test_logits_are_those_of_matrices_truncated_by_the_definition(scorer, form, material, tmp_path):
    source, calibration = material("qwen2")
    recipe = Recipe(ATTENTION, RankPolicy(rank_ratio=0.4), form, scorer=scorer)
    folder, plan = run(source, calibration, recipe, tmp_path / "out")
    weights = truncated_by_hand(source, calibration, plan, scorer)
    expected = logits_with(source, weights)
    assert relative_difference(logits(folder), expected) <= 1e-4
    if scorer != "plain":  # a truncation by the weights alone would have been noticed
        plain = truncated_by_hand(source, calibration, plan, "plain")
        assert relative_difference(logits_with(source, plain), expected) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "gpt_neo"])
def test_parts_of_fused_modules_use_their_own_statistics(family, material, tmp_path):
    source, calibration = material(family)
    recipe = Recipe(ATTENTION, RankPolicy(rank_ratio=0.4), "factored", scorer="two-sided")
    folder, plan = run(source, calibration, recipe, tmp_path / "out")
    expected = logits_with(source, truncated_by_hand(source, calibration, plan, "two-sided"))
    assert relative_difference(logits(folder), expected) <= 1e-4


def test_the_seeds_window_reaches_the_checkpoint(material, tmp_path):
    source, calibration = material("llama")
    policy = RankPolicy(rank_ratio=0.2)
    recipe = Recipe(ATTENTION, policy, "factored", scorer="importance", importance_window=1)
    folder, plan = run(source, calibration, recipe, tmp_path / "out")
    weights = truncated_by_hand(source, calibration, plan, "importance", 1)
    assert relative_difference(logits(folder), logits_with(source, weights)) <= 1e-4
    free = truncated_by_hand(source, calibration, plan, "importance")
    assert relative_difference(logits(folder), logits_with(source, free)) > 1e-3


def test_heads_are_truncated_in_the_metric_of_their_rows(material, tmp_path):
    source, calibration = material("llama")
    recipe = Recipe(("q", "k"), RankPolicy(rank=6), "factored", per_head=True, scorer="two-sided")
    folder, plan = run(source, calibration, recipe, tmp_path / "out")
    weights = source_weights(source.folder)
    for p in (p for p in plan.projections if p.changed):
        weight, s = weights[p.path], calibration.statistics(p.projection)
        left, right = definition("two-sided", weight, s)
        gram, heads = left.T @ left, []
        for rows in np.split(np.arange(len(weight)), len(p.ranks)):
            root = np.linalg.cholesky(gram[np.ix_(rows, rows)]).T
            u, sigma, v = np.linalg.svd(root @ weight[rows] @ right, full_matrices=False)
            kept = np.linalg.solve(root, (u[:, :6] * sigma[:6]) @ v[:6])
            heads.append(np.linalg.solve(right.T, kept.T).T)
        weights[p.path] = np.concatenate(heads)
    assert relative_difference(logits(folder), logits_with(source, weights)) <= 1e-4


def test_an_energy_is_a_share_of_the_scorers_costs(material, tmp_path):
    source, calibration = material("llama")
    recipe = Recipe(("q", "o"), RankPolicy(energy=0.9), "factored", scorer="whitened")
    folder, plan = run(source, calibration, recipe, tmp_path / "out")
    entries = json.loads((folder / "config.json").read_text())["mlx_svd"]["projections"]
    weights = source_weights(source.folder)
    for p in (p for p in plan.projections if p.changed):
        left, right = definition("whitened", weights[p.path], calibration.statistics(p.projection))
        sigma = np.linalg.svd(left @ weights[p.path] @ right, compute_uv=False)
        shares = np.cumsum(sigma**2) / (sigma**2).sum()
        assert p.ranks == (int(np.argmax(shares >= 0.9)) + 1,)
        assert entries[p.path]["energy"] == pytest.approx(shares[p.ranks[0] - 1], abs=1e-6)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_dense_projections_are_quantized_with_compensation(bits, material, tmp_path):
    source, calibration = material("gpt2")
    recipe = Recipe(ATTENTION, rules=(Rule(skip=True),), quantize=Quantization(32, bits))
    folder, _ = run(source, calibration, recipe, tmp_path / "out")
    stock, _ = run(source, None, recipe, tmp_path / "stock")
    ours, theirs = (dict(load_model(f)[0].named_modules()) for f in (folder, stock))
    weights = source_weights(source.folder)
    for linear in source.linears:
        one, other = ours[linear.path], theirs[linear.path]
        if linear.projections[0].name not in ATTENTION:
            assert mx.array_equal(one.weight, other.weight)
            continue
        reads = []
        for module in (one, other):
            read = mx.dequantize(module.weight, module.scales, module.biases, 32, bits)
            reads.append(linear.split(read))
        scales, biases = linear.split(one.scales), linear.split(one.biases)
        for p in linear.projections:
            second, name = calibration.statistics(p).second, p.name
            stored = [np.array(x[name], dtype=np.float64) for x in (scales, biases)]
            codes = textbook(weights[p.path], second, *stored, bits)
            expected = codes * np.repeat(stored[0], 32, 1) + np.repeat(stored[1], 32, 1)
            np.testing.assert_allclose(np.array(reads[0][name]), expected, atol=1e-5)
            errors = [weights[p.path] - np.array(r[name], dtype=np.float64) for r in reads]
            lost = [np.trace(e @ second @ e.T) for e in errors]
            assert lost[0] < 0.9 * lost[1]
    assert np.isfinite(logits(folder)).all()


RECIPES = {
    "two-sided budget": Recipe(
        ATTENTION, scorer="two-sided", budget=Budget(0.5), choices=Choices(group_size=32)
    ),
    "corrected": Recipe(
        ATTENTION,
        budget=Budget(0.5),
        scorer="whitened",
        choices=Choices(("corrected",), (8, 3), 32),
    ),
    "factored, 4 bits": Recipe(
        ("q", "o"), RankPolicy(rank=32), "factored", scorer="whitened", quantize=Quantization(32, 4)
    ),
    "importance by head": Recipe(
        ("q", "k"), RankPolicy(rank=5), "pivot", per_head=True, scorer="importance"
    ),
}


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", RECIPES)
def test_workers_and_interruptions_do_not_change_a_bit(name, material, tmp_path):
    source, calibration = material("llama")
    recipe = RECIPES[name]
    one, plan = run(source, calibration, recipe, tmp_path / "one", workers=1)
    three, _ = run(source, calibration, recipe, tmp_path / "three", workers=3)
    assert contents(three) == contents(one)
    for stop in (2, len(plan.units) // 2, len(plan.units) - 1):
        target, told = tmp_path / f"stopped-{stop}", []

        def advance(unit, stop=stop, told=told):
            told.append(unit.path)
            if len(told) == stop:
                raise Interrupted

        again = open_source(str(source.folder))  # as a new process would
        with pytest.raises(Interrupted):
            run(again, calibration, recipe, target, advance=advance)
        assert not target.exists()
        run(again, calibration, recipe, target)
        assert contents(target) == contents(one)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_what_a_budget_expects_to_lose_is_what_is_lost(share, material, tmp_path):
    """In the scorer's metric, from the matrices that the loaded modules apply."""
    source, calibration = material("llama")
    recipe = Recipe(
        ATTENTION, scorer="whitened", budget=Budget(share), choices=Choices(group_size=32)
    )
    folder, plan = run(source, calibration, recipe, tmp_path / "out")
    modules = dict(load_model(folder)[0].named_modules())
    weights = source_weights(source.folder)
    expected = measured = 0.0
    for p in (p for p in plan.projections if p.loss is not None):
        inputs = mx.concatenate([mx.eye(p.projection.shape[1]), mx.zeros((1, 64))])
        outputs = np.array(modules[p.path](inputs), dtype=np.float64)
        error = weights[p.path] - (outputs[:-1] - outputs[-1]).T
        second = calibration.statistics(p.projection).second
        total = np.trace(weights[p.path] @ second @ weights[p.path].T)
        lost = np.trace(error @ second @ error.T) / total
        assert 0.5 * p.loss - 1e-9 <= lost <= 1.5 * p.loss + 1e-6, (p.path, p.form)
        expected, measured = expected + p.loss, measured + lost
    assert measured == pytest.approx(expected, rel=0.2)
