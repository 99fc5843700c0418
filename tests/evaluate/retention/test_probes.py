"""Facts files are read with their paraphrases and neighbours; a bad entry is named."""

import json

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.retention import Neighbour, read_conflict, read_probes

FRANCE = {
    "relation": "capital",
    "subject": "France",
    "object": "Paris",
    "prompt": "The capital of France is",
    "conflict": "Rome",
    "distractors": ["Oslo"],
}


def write(path, *changes, base=FRANCE):
    path.write_text(json.dumps([{**base, **change} for change in changes]))
    return path


def test_optional_fields_are_read_and_missing_ones_are_empty(tmp_path):
    extra = {
        "paraphrases": ["France's capital is"],
        "locality": [{"prompt": "The capital of Spain is", "object": "Madrid"}],
    }
    first, second = read_probes(write(tmp_path / "f.json", extra, {"subject": "Gaul"}))
    assert first.paraphrases == ("France's capital is",)
    assert first.locality == (Neighbour("The capital of Spain is", "Madrid"),)
    assert (second.paraphrases, second.locality) == ((), ())
    assert (first.id, second.id) == ("capital: France", "capital: Gaul")


def test_facts_of_one_subject_have_ids_of_their_own(tmp_path):
    probes = read_probes(write(tmp_path / "f.json", {}, {"prompt": "France's capital is"}))
    assert [probe.id for probe in probes] == ["capital: France", "capital: France #2"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"object": None}, 'entry 1 has no text in "object"'),
        ({"conflict": "Paris"}, "its object 'Paris' is among the false ones"),
        ({"conflict": "paris "}, "its conflict 'paris ' is the true object"),
        ({"paraphrases": "one"}, '"paraphrases" is not a list of texts'),
        ({"locality": [{"prompt": "Spain"}]}, '"locality" is not a list of objects with texts'),
    ],
)
def test_a_bad_entry_is_named(tmp_path, change, words):
    path = write(tmp_path / "f.json", {}, change)
    with pytest.raises(MlxSvdError, match="entry 1") as error:
        read_probes(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_a_conflict_may_not_ask_the_same_twice(tmp_path):
    with pytest.raises(MlxSvdError, match=r"entry 1: the prompt .* is there twice"):
        read_conflict(write(tmp_path / "c.json", {}, {"conflict": "Oslo", "distractors": []}))
