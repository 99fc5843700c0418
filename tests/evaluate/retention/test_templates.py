"""Templates of a relation become paraphrases of its facts; bad ones are named."""

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.retention import check_templates, read_templates, with_paraphrases
from tests.evaluate.retention.conftest import probe

TREES = [probe(0), probe(1, subject="larch"), probe(2, relation="bush")]


def test_every_fact_of_a_relation_is_asked_in_the_other_words(tmp_path):
    path = tmp_path / "templates.yaml"
    path.write_text('tree: ["{subject} grows as", "A {subject} is"]\n')
    first, second, other = with_paraphrases(TREES, read_templates(path))
    assert first.paraphrases == ("S0 grows as", "A s0 is")
    assert second.paraphrases == ("Larch grows as", "A larch is")
    assert other == TREES[2], "a relation without templates keeps its facts as they are"
    assert first.fact == TREES[0].fact


def test_what_is_asked_already_is_not_asked_twice():
    known = probe(0, paraphrases=("A s0 is",))
    own = "{subject} of tree is"
    assert known.fact.prompt == own.replace("{subject}", "s0")
    # A prompt begins with a capital, this one's fact does not.
    templates = {"tree": ["A {subject} is", "The {subject} of tree is", "A {subject} is"]}
    (found,) = with_paraphrases([known], templates)
    assert found.paraphrases == ("A s0 is", "The s0 of tree is")
    capital = probe(0, subject="S0")
    assert with_paraphrases([capital], {"tree": [own]})[0].paraphrases == ()


def test_a_relation_that_no_fact_has_is_named_with_the_nearest():
    with pytest.raises(MlxSvdError, match=r"relation 'trees'.*the facts have tree\)"):
        with_paraphrases(TREES, {"trees": ["A {subject} is"]})


@pytest.mark.parametrize(
    "content",
    ["a text", {}, {"tree": "A {subject} is"}, {"tree": []}, {"tree": ["An oak is"]},
     {"tree": ["{subject} {subject}"]}, {"tree": [{"subject": None}]}],
)  # fmt: skip
def test_what_is_no_template_is_refused(content):
    with pytest.raises(MlxSvdError, match=r"^here: "):
        check_templates(content, "here")


@pytest.mark.parametrize("content", [b"tree: [", b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_named(content, tmp_path):
    path = tmp_path / "templates.yaml"
    path.write_bytes(content)
    for given in (path, tmp_path / "none.yaml"):
        with pytest.raises(MlxSvdError, match=r"\.yaml: cannot be read as YAML"):
            read_templates(given)
