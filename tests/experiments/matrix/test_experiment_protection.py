"""Kind protection on the embedded model: what is paired, what is quantized."""

import pytest

from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.matrix.comparisons import compare_runs
from mlx_svd.experiments.matrix.kinds.protection import Protection, arm_of

SETTINGS = {
    "model": str(DEMO_MODEL),
    "facts": {"file": "facts.json"},
    "text": {"file": "text.txt", "windows": 4, "length": 32},
    "conflict": 4,
    "train": {"lr": 1e-3, "steps": 4, "measure_every": 2, "batch_size": 4},
    "uptakes": [0.25],
    "quantize": {"int4": {"granularity": "tensor", "bits": 4}},
}


@pytest.fixture
def kind(places):
    return Protection(SETTINGS, places)


def test_arms_of_a_seed_are_asked_the_same_facts_before_and_after_quantizing(kind):
    runs = {arm: kind.run({"arm": arm}, 0) for arm in ("base", "none", "cf90")}
    for measured in runs.values():
        assert measured.metrics["retained"].items == runs["base"].metrics["retained"].items
        assert measured.metrics["uptake"].items == runs["base"].metrics["uptake"].items
        assert len(measured.metrics["uptake"].items) == 4
        before, after = (measured.metrics[m] for m in ("perplexity", "int4 perplexity"))
        assert before.items == after.items
        assert before.values != after.values
    base = runs["base"].metrics
    assert set(base["retained"].values) == {1.0}, "only known facts can be lost"
    assert not any(base["uptake"].values)
    # Unprotected training at this rate takes up what it is taught, and loses some of the rest.
    assert runs["none"].metrics["uptake"].mean > 0.25
    assert runs["none"].numbers["reached_0.25"] == 1
    at = runs["none"].metrics["retained_at_0.25"]
    assert at.items == base["retained"].items
    assert all(0 <= v <= 1 for v in at.values)
    assert runs["cf90"].numbers["trained_share"] < 1 == runs["none"].numbers["trained_share"]
    found = compare_runs({0: runs["none"]}, {0: runs["cf90"]}, "retained")
    assert found.left_out == 0


def test_several_paraphrases_of_a_fact_are_one_item_of_which_the_known_ones_count(places):
    templates = ["The capital city of {subject} is", "People in {subject} live in"]
    facts = {**SETTINGS["facts"], "paraphrases": {"capital": templates}}
    kind = Protection({**SETTINGS, "facts": facts, "quantize": {}}, places)
    before, after = (kind.run({"arm": arm}, 0).metrics for arm in ("base", "none"))
    kept = before["paraphrase_retained"]
    assert kept.values == kept.weights, "what the base model knows in other words is known"
    assert set(kept.items) <= set(before["retained"].items)
    assert set(kept.weights) <= {1, 2}
    taken = before["paraphrase_uptake"]
    assert taken.items == before["uptake"].items
    assert set(taken.weights) == {2}
    for suffix in ("", "_at_0.25"):
        retained, uptake = (after[f"paraphrase_{n}{suffix}"] for n in ("retained", "uptake"))
        assert (retained.items, retained.weights) == (kept.items, kept.weights)
        assert uptake.items == taken.items
        assert uptake.mean > taken.mean, "the false object is likelier in other words too"
    parts = [f"retained_{n}" for n in ("same_subject", "same_relation")]
    near = [item for part in parts if part in after for item in after[part].items]
    assert sorted(near) == sorted(after["retained"].items)


def test_templates_without_a_subject_are_refused_before_anything_is_loaded(places):
    facts = {**SETTINGS["facts"], "paraphrases": {"capital": ["The capital is"]}}
    with pytest.raises(MlxSvdError, match="facts: paraphrases: relation 'capital'"):
        Protection({**SETTINGS, "facts": facts}, places)


def test_an_arm_may_be_changed():
    arm = arm_of({"base": "cf90", "share": 0.5, "projections": "q,k"})
    assert (arm.share, arm.projections, arm.compress) == (0.5, ("q", "k"), "frozen")


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ({}, "needs an arm"),
        ({"arm": "cf91"}, "cf91"),
        ({"arm": {"base": "cf90", "sharing": 1}}, "'sharing'"),
        ({"arm": "none", "train": {"seed": 3}}, "'seed'"),
        ({"arm": "none", "train": {"lr": -1}}, "--lr -1"),
    ],
)
def test_wrong_arms_are_refused(condition, words, kind):
    with pytest.raises(MlxSvdError, match=words):
        kind.check(condition)
