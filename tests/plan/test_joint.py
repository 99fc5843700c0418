"""Slices in a budget: expected losses against explicit samples, and the choice among all."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from mlx_svd.calibrate.scorers import Scoring, score
from mlx_svd.calibrate.sliced import Affine, slice_member, slicing_losses
from mlx_svd.calibrate.statistics import Statistics
from mlx_svd.checkpoint.loader import tensor_bytes
from mlx_svd.compress import compress
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.budget import Budget, choose
from mlx_svd.plan.candidates import Candidate, measure_candidates
from mlx_svd.plan.choices import parse_choices
from mlx_svd.plan.joint import measure_joint, sliceable_groups
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.recipe import Recipe, Rule
from mlx_svd.plan.recipe_file import load_recipe_fields
from mlx_svd.source.families import PROJECTIONS, Projection
from mlx_svd.source.slices import SliceGroup
from mlx_svd.source.source import open_source
from tests.compress.test_sliced import calibrated
from tests.linalg.test_slicing import correlated, moment, positive
from tests.tiny import write_tiny

D, N = 8, 20
SHAPES = {"q": (32, N), "k": (16, N), "v": (16, N), "o": (N, 32), "down": (N, 24)}


def known(p: Projection, left: np.ndarray) -> tuple[Statistics, np.ndarray]:
    """Statistics of random samples, and the samples."""
    inputs = correlated(p.shape[1], 30)
    second, mean = moment(inputs), inputs.mean(0)
    return Statistics(second, mean, np.abs(inputs).mean(0), left), inputs


def group(kind: str, names: tuple[str, ...]) -> SliceGroup:
    heads = {"q": 4, "k": 2, "v": 2}
    members = tuple(
        Projection(name, name, name, 0, SHAPES[name], heads.get(name, 0), False) for name in names
    )
    return SliceGroup(kind, 0, members, 4, 2, D) if kind != "mlp" else SliceGroup(
        kind, 0, members, 1, 1, 24
    )  # fmt: skip


def setting(kind: str, names: tuple[str, ...], scorer: str):
    """group, Affines, statistics, scores, samples by name."""
    g, rng = group(kind, names), np.random.default_rng(31)
    matrices, statistics, samples = {}, {}, {}
    for p in g.members:
        bias = rng.standard_normal(p.shape[0]) if p.name in ("q", "k", "v") else None
        matrices[p.name] = Affine(rng.standard_normal(p.shape), bias)
        statistics[p.name], samples[p.name] = known(p, positive(p.shape[0], 32))
    scores = {n: score(scorer, matrices[n].weight, statistics[n]) for n in names}
    return g, matrices, lambda p: statistics[p.name], scores, samples


def measured(errors: np.ndarray, metric) -> float:
    """unit * E[e^T L e]."""
    left = np.eye(errors.shape[1]) if metric.left is None else metric.left
    return metric.unit * float(np.einsum("si,ij,sj->", errors, left, errors)) / len(errors)


@pytest.mark.parametrize("scorer", ["two-sided", "whitened"])
@pytest.mark.parametrize(("kind", "names"), [("vo", ("v", "o")), ("mlp", ("down",))])
def test_expected_loss_is_the_error_of_the_output_on_samples(kind, names, scorer):
    g, matrices, statistics, scores, samples = setting(kind, names, scorer)
    reader = names[-1]
    needed = {reader: matrices[reader]}
    sizes = [3, 6]
    losses = slicing_losses(g, sizes, needed, statistics, scores)
    for size in sizes:
        sliced = slice_member(g, g.reader, size, needed, statistics)
        missed = matrices[reader].weight - sliced.lift(sliced.weight)
        expected = measured(samples[reader] @ missed.T, scores[reader].metric)
        assert losses[size] == pytest.approx(expected, rel=1e-4)
    assert losses[3] > losses[6] > 0


@pytest.mark.parametrize("scorer", ["two-sided", "whitened"])
def test_expected_loss_of_pairs_is_that_of_zero_outputs_bias_included(scorer):
    g, matrices, statistics, scores, samples = setting("qk", ("q", "k"), scorer)
    losses = slicing_losses(g, [4], matrices, statistics, scores)
    found = []
    for name in ("q", "k"):
        p, own = g.member(name), matrices[name]
        pairs = slice_member(g, p, 4, matrices, statistics).pairs
        outputs = samples[name] @ own.weight.T + own.bias
        heads = outputs.reshape(len(outputs), p.heads, D)
        heads[:, :, [*pairs, *(i + D // 2 for i in pairs)]] = 0
        found.append(measured(heads.reshape(outputs.shape), scores[name].metric))
    assert losses[4] == pytest.approx(np.mean(found), rel=1e-9)


def candidates(rng, form: str, count: int) -> list[Candidate]:
    sizes = np.sort(rng.integers(1, 200, count))
    losses = np.sort(rng.random(count))[::-1]
    pairs = zip(sizes, losses, strict=True)
    return [Candidate(form, i, None, None, int(s), float(x)) for i, (s, x) in enumerate(pairs)]


def instance(seed: int):
    """Two groups (of two and of three) and a projection alone."""
    rng = np.random.default_rng(seed)
    single = {path: candidates(rng, "dense", 4) for path in "abcdef"}
    joint = []
    for members in ("ab", "cde"):
        parts = [candidates(rng, "sliced", 3) for _ in members]
        joint.append(
            [dict(zip(members, option, strict=True)) for option in zip(*parts, strict=True)]
        )
    return single, joint


def every_choice(single, joint):
    """(bytes, loss) of all combinations."""
    states = [
        [list(c) for c in product(*(single[p] for p in members))]
        + [list(option.values()) for option in options]
        for members, options in zip(("ab", "cde"), joint, strict=True)
    ]
    for parts in product(*states, [[c] for c in single["f"]]):
        flat = [c for part in parts for c in part]
        yield sum(c.nbytes for c in flat), sum(c.loss for c in flat)


@pytest.mark.parametrize("seed", range(12))
def test_choice_is_the_best_of_all_at_the_budgets_of_the_convex_hull(seed):
    single, joint = instance(seed)
    everything = list(every_choice(single, joint))
    for price in np.geomspace(1e-5, 1, 25):
        limit, loss = min(everything, key=lambda pair: pair[1] + price * pair[0])
        chosen = choose(single, limit, joint=joint).values()
        assert sum(c.nbytes for c in chosen) <= limit
        assert sum(c.loss for c in chosen) <= loss + 1e-12


def test_choice_keeps_any_budget_and_slices_groups_as_a_whole():
    outcomes = set()
    for seed in range(6):
        single, joint = instance(seed)
        sizes = sorted(size for size, _ in every_choice(single, joint))
        for limit in np.linspace(sizes[0], sizes[-1], 30).astype(int):
            chosen = choose(single, int(limit), joint=joint)
            assert list(chosen) == list(single)
            assert sum(c.nbytes for c in chosen.values()) <= limit
            for members in ("ab", "cde"):
                (form,) = {chosen[p].form for p in members}
                outcomes.add((members, form))
                assert form == "dense" or len({chosen[p].rank for p in members}) == 1
        with pytest.raises(MlxSvdError, match=f"below the {sizes[0]:,}"):
            choose(single, sizes[0] - 1, joint=joint)
    assert len(outcomes) == 4


def test_slice_that_is_worse_is_never_taken_and_one_that_is_better_always():
    own = {
        p: [Candidate("dense", None, None, None, s, x) for s, x in ((10, 1), (20, 0))] for p in "ab"
    }

    def option(size, loss):
        return [{p: Candidate("sliced", 1, None, None, size, loss) for p in "ab"}]

    for limit in (20, 25, 30):
        worse = choose(own, limit, joint=[option(10, 1.1)])
        better = choose(own, limit, joint=[option(10, 0.4)])
        assert {c.form for c in worse.values()} == {"dense"}
        assert {c.form for c in better.values()} == {"sliced"}
    assert {c.form for c in choose(own, 40, joint=[option(10, 0.4)]).values()} == {"dense"}


BUDGET = {"scorer": "two-sided", "choices": parse_choices("sliced", "16")}


@pytest.mark.parametrize("keep", [0.9, 0.6])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_plan_within_a_budget_slices_and_its_bytes_are_those_on_disk(family, keep, tmp_path):
    model = write_tiny(family, tmp_path / "model")
    source, calibration = open_source(str(model)), calibrated(model)
    recipe = Recipe(PROJECTIONS, budget=Budget(keep_bytes=keep), **BUDGET)
    plan = make_plan(source, recipe, calibration=calibration)
    assert {p.form for p in plan.projections} >= {"sliced"}
    touched = [p for p in plan.projections if p.projection.name in PROJECTIONS]
    assert sum(p.bytes_after for p in touched) <= keep * sum(p.bytes_before for p in touched)
    folder = compress(source, plan, tmp_path / "out", calibration=calibration)
    assert tensor_bytes(folder) == {t.name: t.nbytes for t in plan.tensors}
    again = make_plan(source, recipe, calibration=calibration)  # from the calibration's folder
    assert again.digest == plan.digest


def test_quantized_slices_of_a_budget_can_be_repeated_from_the_saved_plan(tmp_path):
    model = write_tiny("llama", tmp_path / "model")
    source, calibration = open_source(str(model)), calibrated(model)
    choices = parse_choices("sliced", "8,4", 32)
    recipe = Recipe(PROJECTIONS, scorer="two-sided", budget=Budget(keep_bytes=0.1), choices=choices)
    plan = make_plan(source, recipe, calibration=calibration)
    sliced = [p for p in plan.projections if p.form == "sliced"]
    assert any(p.quantization for p in sliced)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    fields = load_recipe_fields(tmp_path / "plan.json")
    again = make_plan(source, Recipe(**fields), calibration=calibration)
    assert again.tensors == plan.tensors


def test_members_that_a_rule_skips_are_not_sliced(tmp_path):
    model = write_tiny("llama", tmp_path / "model")
    rules = (Rule(projections=("up",), skip=True), Rule(match=("**.0.**.k_proj",), skip=True))
    recipe = Recipe(PROJECTIONS, rules=rules, budget=Budget(keep_bytes=0.8), **BUDGET)
    source, calibration = open_source(str(model)), calibrated(model)
    plan = make_plan(source, recipe, calibration=calibration)
    forms = {p.path: p.form for p in plan.projections}
    assert "sliced" not in {f for path, f in forms.items() if "mlp" in path}
    assert forms["model.layers.0.self_attn.q_proj"] == "dense"
    assert "sliced" in forms.values()


def test_rounding_is_added_to_the_loss_of_a_slice(tmp_path):
    model = write_tiny("llama", tmp_path / "model")
    source, calibration = open_source(str(model)), calibrated(model)
    scoring, choices = Scoring("two-sided", None, calibration), parse_choices("dense", "16,8", 32)
    wanted = [p for linear in source.linears for p in linear.projections]
    single = measure_candidates(source, wanted, choices, scoring, None)
    groups = sliceable_groups(source, set(single), scoring)
    assert [g.kind for g in groups] == ["qk", "vo", "mlp"] * 2
    for options in measure_joint(source, groups, single, choices, scoring, None):
        losses = {}
        for option in options:
            first = next(iter(option.values()))
            bits = first.quantization.bits if first.quantization else 16
            losses[first.rank, bits] = sum(c.loss for c in option.values())
        sizes = [size for size, bits in losses if bits == 8]
        for size in sizes:
            noise = sum(
                c.loss for path in options[0] for c in single[path]
                if c.form == "dense" and c.quantization
            )  # fmt: skip
            assert losses[size, 8] == pytest.approx(losses[size, 16] + noise)
        assert sizes


def refusal(model: Path, recipe: Recipe) -> str:
    with pytest.raises(MlxSvdError) as raised:
        make_plan(open_source(str(model)), recipe, calibration=calibrated(model))
    return str(raised.value)


def test_budget_that_cannot_slice_says_why(tmp_path):
    llama, budget = write_tiny("llama", tmp_path / "a" / "model"), Budget(keep_bytes=0.8)
    choices = parse_choices("sliced", "16")
    alone = Recipe(("q", "o"), budget=budget, **BUDGET)
    assert "q and k, v and o" in refusal(llama, alone)
    plain = Recipe(PROJECTIONS, budget=budget, choices=choices)
    assert "--scorer whitened or two-sided" in refusal(llama, plain)
    gpt2 = write_tiny("gpt2", tmp_path / "b" / "model")
    values = Recipe(("v", "o"), budget=budget, **BUDGET)
    assert "v/o of a gpt2 model" in refusal(gpt2, values)
