"""Steps on a loaded model, against numpy's SVD and plain loops."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_svd.analyze.subject import Subject
from mlx_svd.checkpoint.loader import load
from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.matrix.importance import mean_absolute_gradients, prompt_sentences
from mlx_svd.experiments.matrix.ledger import byte_numbers, parameters_of
from mlx_svd.experiments.matrix.material import read_facts_of
from mlx_svd.experiments.matrix.places import Places
from mlx_svd.experiments.matrix.ranks import factored_parameters, fitting_ratio
from mlx_svd.experiments.matrix.steps import (
    applied,
    check_steps,
    relative_change,
    run_steps,
    steps_are_seeded,
)
from mlx_svd.experiments.matrix.workbench import Workbench
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe
from mlx_svd.source.source import open_source
from tests.experiments.matrix.capitals import SETTINGS


@pytest.fixture(scope="module")
def bench(data, tmp_path_factory) -> Workbench:
    places = Places(data, tmp_path_factory.mktemp("shared"))
    source = open_source(str(data / "tiny"))
    model, tokenizer = load(source.folder, dtype="float32")
    subject = Subject(source, model, tokenizer, None, "float32")
    facts = read_facts_of(SETTINGS["facts"], places)
    return Workbench(subject, facts, SETTINGS, places)


def best(weight: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def test_plain_truncation_is_the_best_approximation_of_the_seeds_rank(bench):
    changed = run_steps(bench, [{"truncate": {"projections": "q,k,o", "rank_ratio": 0.7}}], 0)
    assert {bench.subject.projections[p].name for p in changed.weights} == {"q", "k", "o"}
    for path, weight in changed.weights.items():
        rank = int(0.7 * min(weight.shape))
        assert changed.ranks[path] == rank
        np.testing.assert_allclose(weight, best(bench.originals[path], rank), atol=1e-5)


def test_a_step_works_on_what_the_step_before_it_left(bench):
    steps = [
        {"quantize": {"granularity": "tensor", "bits": 4}},
        {"truncate": {"projections": "k", "rank_ratio": 0.5}},
    ]
    first, both = run_steps(bench, steps[:1], 0), run_steps(bench, steps, 0)
    for path, rank in both.ranks.items():
        np.testing.assert_allclose(both.weights[path], best(first.weights[path], rank), atol=1e-5)


def test_noise_has_the_norm_of_what_the_truncation_changes(bench):
    options = {"projections": "q,v", "rank_ratio": 0.5}
    truncated = run_steps(bench, [{"truncate": options}], 0)
    noisy, other = (run_steps(bench, [{"noise": options}], seed) for seed in (0, 1))
    assert not noisy.ranks
    for path, weight in noisy.weights.items():
        original = bench.originals[path]
        expected = np.linalg.norm(truncated.weights[path] - original)
        assert np.linalg.norm(weight - original) == pytest.approx(expected)
        assert np.abs(weight - other.weights[path]).max() > 0
    assert relative_change(bench, noisy) == pytest.approx(relative_change(bench, truncated))


def test_random_components_are_worse_than_the_largest(bench):
    options = {"projections": "q", "rank_ratio": 0.5}
    plain = run_steps(bench, [{"truncate": options}], 0)
    drawn = run_steps(bench, [{"truncate": options | {"scorer": "random"}}], 0)
    assert drawn.ranks == plain.ranks
    assert relative_change(bench, drawn) > 1.05 * relative_change(bench, plain)
    for path, rank in drawn.ranks.items():
        assert np.linalg.matrix_rank(drawn.weights[path], tol=1e-6) == rank


def test_importance_is_the_mean_absolute_gradient_over_sentences(bench):
    sentences = ["The capital of France is Paris.", "Two words."]
    found = mean_absolute_gradients(bench.subject, sentences)
    model = bench.subject.model
    expected = tree_map(mx.zeros_like, model.parameters())
    for sentence in sentences:
        tokens = mx.array(bench.subject.tokenizer.encode(sentence))[None]

        def loss(model, tokens=tokens):
            return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

        _, gradients = nn.value_and_grad(model, loss)(model)
        expected = tree_map(lambda e, g: e + mx.abs(g) / 2, expected, gradients)
    flat = dict(tree_flatten(expected))
    for path, value in found.items():
        np.testing.assert_allclose(
            value, np.array(flat[f"{path}.weight"]), rtol=2e-3, atol=1e-7, err_msg=path
        )


def test_importance_keeps_the_components_with_the_highest_scores(bench):
    steps = [{"truncate": {"projections": "v", "rank": 3, "scorer": "importance"}}]
    changed = run_steps(bench, steps, 1)
    gradients = mean_absolute_gradients(
        bench.subject, prompt_sentences(bench.facts, 1, 2, leaky=False)
    )
    for path, weight in changed.weights.items():
        u, s, v = np.linalg.svd(bench.originals[path].astype(np.float64), full_matrices=False)
        scores = [
            (np.abs(s[j] * np.outer(u[:, j], v[j])) * gradients[path]).sum() for j in range(len(s))
        ]
        kept = np.argsort(scores)[::-1][:3]
        np.testing.assert_allclose(weight, (u[:, kept] * s[kept]) @ v[kept], atol=1e-5)


def test_prompts_of_importance_are_never_asked_unless_it_is_leaky(bench):
    facts = bench.facts
    assert not {f.subject for f in facts.test} & {f.subject for f in facts.reserve}
    asked = {f"{f.prompt} {f.object}." for f in facts.test}
    assert not asked & set(prompt_sentences(facts, 0, 3, leaky=False))
    assert set(prompt_sentences(facts, 0, 3, leaky=True)) <= asked
    with pytest.raises(MlxSvdError, match="larger reserve"):
        prompt_sentences(facts, 0, 4, leaky=False)


def test_calibrated_scorers_depend_on_the_seed_and_the_model_comes_back(bench):
    steps = [{"truncate": {"projections": "q", "rank_ratio": 0.5, "scorer": "whitened"}}]
    found = [run_steps(bench, steps, seed) for seed in (0, 1, 0)]
    (path,) = [p for p in found[0].weights if ".0." in p]
    assert np.abs(found[0].weights[path] - found[1].weights[path]).max() > 1e-6
    np.testing.assert_array_equal(found[0].weights[path], found[2].weights[path])
    tokens = mx.array([[1, 2, 3]])
    before = np.array(bench.subject.model(tokens))
    with applied(bench, found[0]) as model:
        assert np.abs(np.array(model(tokens)) - before).max() > 1e-4
    np.testing.assert_array_equal(np.array(bench.subject.model(tokens)), before)


def test_embedding_and_norms_are_quantized_when_asked_for(bench):
    steps = [{"quantize": {"granularity": "tensor", "bits": 8, "modules": "all"}}]
    changed = run_steps(bench, steps, 0)
    assert "model.embed_tokens" in changed.others
    assert any("layernorm" in path for path in changed.others)
    numbers = byte_numbers(bench, changed)
    assert numbers["bytes"] < 0.51 * numbers["bytes_before"]


def test_bytes_are_those_of_the_plan(bench):
    steps = [{"truncate": {"projections": "q,k,o", "rank_ratio": 0.4}}]
    changed = run_steps(bench, steps, 0)
    recipe = Recipe(("q", "k", "o"), policy=RankPolicy(rank_ratio=0.4))
    plan = make_plan(bench.subject.source, recipe)
    numbers = byte_numbers(bench, changed)
    assert numbers["bytes"] == plan.bytes_after
    assert numbers["bytes_before"] == plan.bytes_before
    touched = [p for p in plan.projections if p.changed]
    share = sum(p.bytes_after for p in touched) / sum(p.bytes_before for p in touched)
    assert numbers["keep_bytes"] == pytest.approx(share)


def test_a_weight_that_is_changed_after_quantizing_is_not_counted_as_quantized(bench):
    quantize = {"quantize": {"granularity": "tensor", "bits": 8, "projections": "k"}}
    truncate = {"truncate": {"projections": "k", "rank_ratio": 0.3}}
    before, after, alone = (
        byte_numbers(bench, run_steps(bench, steps, 0))["bytes"]
        for steps in ([truncate, quantize], [quantize, truncate], [truncate])
    )
    assert before == byte_numbers(bench, run_steps(bench, [quantize], 0))["bytes"]
    assert after == alone


def test_a_number_of_parameters_is_met_as_closely_as_one_rank_allows(bench):
    total = parameters_of(bench, run_steps(bench, [], 0))
    wanted = total - 20_000
    steps = [{"truncate": {"projections": "all", "parameters": wanted}}]
    changed = run_steps(bench, steps, 0)
    got = parameters_of(bench, changed)
    assert got <= wanted
    shapes = [p.shape for p in bench.subject.projections.values()]
    fixed = total - sum(m * n for m, n in shapes)
    ratio = fitting_ratio(shapes, wanted - fixed)
    larger = ratio + 1.001 / max(map(min, shapes))
    assert fixed + factored_parameters(shapes, larger) > wanted
    with pytest.raises(MlxSvdError, match="rank 1"):
        fitting_ratio(shapes, 10)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"shrink": {}}], "truncate, noise, quantize"),
        ([{"truncate": {"rank_ratio": 0.5, "rank": 3}}], "exactly one"),
        ([{"truncate": {"rank_ratio": 0.5, "scorer": "magic"}}], "magic"),
        ([{"truncate": {"rank_ratio": 0.5, "leaky": True}}], "leaky"),
        ([{"truncate": {"rank_ratio": 0.5, "ratio": 1}}], "'ratio'"),
        ([{"quantize": {"granularity": "blocks"}}], "blocks"),
        ([{"quantize": {"modules": "some"}}], "projections or all"),
    ],
)
def test_wrong_steps_are_refused(steps, words):
    with pytest.raises(MlxSvdError, match=words):
        check_steps(steps)


@pytest.mark.parametrize(
    ("steps", "seeded"),
    [
        ([], False),
        ([{"truncate": {"rank_ratio": 0.5}}, {"quantize": {"granularity": "tensor"}}], False),
        ([{"noise": {"rank_ratio": 0.5}}], True),
        ([{"truncate": {"rank_ratio": 0.5, "scorer": "importance"}}], True),
        ([{"quantize": {"granularity": "compensated"}}], True),
    ],
)
def test_steps_without_anything_random_do_not_depend_on_a_seed(steps, seeded):
    assert steps_are_seeded(steps) is seeded
