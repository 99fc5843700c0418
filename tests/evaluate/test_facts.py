"""Facts recalled, against a loop over single sequences in numpy."""

import json

import numpy as np
import pytest

from mlx_svd.checkpoint.loader import load
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.facts import FactRecall, facts_recalled, read_facts
from tests.evaluate.reference import losses

ENTRY = {
    "relation": "capital",
    "subject": "France",
    "object": "Paris",
    "prompt": "The capital of France is",
    "conflict": "Ouagadougou",
    "distractors": ["Rome", "London"],
}


@pytest.fixture(scope="module")
def demo():
    return load(DEMO_MODEL, dtype="float32")


def write(path, entries):
    path.write_text(json.dumps(entries))
    return path


def false_fact(subject, false_object):
    entry = {**ENTRY, "subject": subject, "prompt": f"The capital of {subject} is"}
    return {**entry, "object": false_object, "distractors": ["Paris", "London"]}


def one_by_one(model, tokenizer, prompt, candidate):
    whole, context = tokenizer.encode(f"{prompt} {candidate}"), len(tokenizer.encode(prompt))
    return -losses(model, whole)[context - 1 :].sum()


@pytest.mark.parametrize("batch", [1, 60, 4096])
def test_recall_is_that_of_a_loop_over_single_sequences(demo, shared, batch):
    facts = read_facts(shared / "data/facts/facts.json")[:12]
    found = facts_recalled(*demo, facts, batch)
    for number, fact in enumerate(facts):
        scores = np.array([one_by_one(*demo, fact.prompt, x) for x in fact.candidates])
        per_character = scores / [len(x) for x in fact.candidates]
        for margins, values in (
            (found.margins, scores),
            (found.normalized_margins, per_character),
        ):
            assert margins[number] == pytest.approx(values[0] - values[1:].max(), abs=1e-3)
        assert found.recalled[number] == all(scores[0] > x for x in scores[1:])


def test_the_demo_model_recalls_what_it_was_taught_and_not_falsehoods(demo, tmp_path):
    true = read_facts(write(tmp_path / "true.json", [ENTRY]))
    false = read_facts(
        write(
            tmp_path / "false.json", [false_fact("France", "Rome"), false_fact("England", "Rome")]
        )
    )
    assert facts_recalled(*demo, true).recalled.tolist() == [True]
    assert facts_recalled(*demo, false).recalled.tolist() == [False, False]


def test_shared_models_know_most_facts(demo, shared):
    facts = read_facts(shared / "data/facts/facts.json")
    assert len(facts) == 915
    share = facts_recalled(*demo, facts[::15]).share
    assert share.n == 61
    assert share.share > 0.8
    assert share.low < share.share <= share.high


def test_facts_kept_are_counted_among_those_the_dense_model_knows():
    dense = FactRecall(np.array([1.0, 1.0, -1.0, 2.0]), np.array([1.0, 1.0, 1.0, 1.0]))
    row = FactRecall(np.array([1.0, -0.5, 3.0, 0.1]), np.array([1.0, -1.0, 1.0, 1.0]))
    kept = row.kept(dense)
    assert (kept.count, kept.n) == (2, 3)
    assert row.share.count == 3
    assert row.share_normalized.count == 3
    with pytest.raises(MlxSvdError, match="ask both the same"):
        row.kept(FactRecall(np.ones(3), np.ones(3)))


def test_an_equal_log_likelihood_is_not_recall():
    assert not FactRecall(np.zeros(1), np.zeros(1)).recalled[0]


@pytest.mark.parametrize("key", ["relation", "subject", "object", "prompt", "conflict"])
def test_a_missing_field_names_file_entry_and_field(tmp_path, key):
    entry = {k: v for k, v in ENTRY.items() if k != key}
    path = write(tmp_path / "facts.json", [ENTRY, entry])
    with pytest.raises(MlxSvdError, match=rf'facts\.json: entry 1 has no text in "{key}"'):
        read_facts(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not a JSON list with facts"),
        ('["x"]', "entry 0 is not a JSON object"),
        (json.dumps([{**ENTRY, "distractors": "Rome"}]), 'no list of texts in "distractors"'),
        (json.dumps([{**ENTRY, "distractors": ["Paris"]}]), "'Paris' is among the false ones"),
    ],
)
def test_damaged_files_are_one_line_that_names_them(tmp_path, content, message):
    path = tmp_path / "facts.json"
    path.write_text(content)
    with pytest.raises(MlxSvdError, match=message) as error:
        read_facts(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
