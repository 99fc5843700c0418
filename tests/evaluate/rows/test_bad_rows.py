"""Rows that cannot be used are named with their file and line, before anything is computed."""

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.scorer import Scorer
from tests.evaluate.capitals import choice_rows, run, write

# content of a row (or of the file) -> words that the message must hold
BAD_ROWS = {
    "no question": ({"choices": ["a", "b"], "label": 0}, 'line 2 has no text in "question"'),
    "question a number": (
        {"question": 3, "choices": ["a", "b"], "label": 0},
        'line 2 has no text in "question"',
    ),
    "no choices": (
        {"question": "q", "choices": [], "label": 0},
        'line 2 has no list of texts in "choices"',
    ),
    "one choice": (
        {"question": "q", "choices": ["a"], "label": 0},
        'line 2 has one text in "choices"; give at least two',
    ),
    "an empty choice": (
        {"question": "q", "choices": ["a", " "], "label": 0},
        'line 2: "choices" holds something that is empty',
    ),
    "no label": ({"question": "q", "choices": ["a", "b"]}, 'no whole number in "label"'),
    "label a text": ({"question": "q", "choices": ["a", "b"], "label": "A"}, "no whole number"),
    "label true": ({"question": "q", "choices": ["a", "b"], "label": True}, "no whole number"),
    "label too large": (
        {"question": "q", "choices": ["a", "b"], "label": 2},
        'line 2: "label" is 2, but there are 2 choices; use 0 to 1',
    ),
    "label negative": ({"question": "q", "choices": ["a", "b"], "label": -1}, '"label" is -1'),
    "a list": ([1], "line 2 is not a JSON object"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_with_its_file_and_line(case, tmp_path):
    row, words = BAD_ROWS[case]
    path = write(tmp_path / "own.jsonl", [choice_rows()[0], row])
    with pytest.raises(MlxSvdError) as error:
        run([path], tmp_path / "out")
    assert str(path) in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


BAD_FILES = {
    "empty": ("", "is empty"),
    "not JSON": ('{"question": \n', "line 1 is not JSON"),
    "other fields": ('{"text": "a"}\n', r'line 1 has the fields \["text"\]'),
    "not text": (b"\xff\xfe{", "cannot be read as text"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named(case, tmp_path):
    content, words = BAD_FILES[case]
    path = tmp_path / "own.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MlxSvdError, match=words) as error:
        run([path], tmp_path / "out")
    assert str(path) in str(error.value)


TRUTH = {"question": "q", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]}}
BAD_TARGETS = {
    "missing": ({"question": "q"}, 'no object in "mc1_targets"; give one with choices and labels'),
    "no labels": (
        {**TRUTH, "mc1_targets": {"choices": ["a"]}},
        'no list of 0 and 1 in "labels" of "mc1_targets"',
    ),
    "too few labels": (
        {**TRUTH, "mc1_targets": {"choices": ["a", "b"], "labels": [1]}},
        'line 2: 1 "labels" with 1 right ones for 2 choices',
    ),
    "nothing right": (
        {**TRUTH, "mc1_targets": {"choices": ["a", "b"], "labels": [0, 0]}},
        "at least one 1",
    ),
}


@pytest.mark.parametrize("case", BAD_TARGETS)
def test_bad_targets_are_named_with_file_and_line(case, tmp_path):
    row, words = BAD_TARGETS[case]
    write(tmp_path / "truthfulqa_mc.jsonl", [TRUTH, row])
    with pytest.raises(MlxSvdError) as error:
        run(["truthfulqa_mc1"], tmp_path / "out", data_dir=tmp_path)
    assert words in str(error.value)
    assert "truthfulqa_mc.jsonl: line 2" in str(error.value)


def test_a_subject_with_too_few_examples_is_named(tmp_path):
    row = {"question": "q", "subject": "law", "choices": list("abcd"), "label": 0}
    write(tmp_path / "mmlu.jsonl", [row])
    write(tmp_path / "mmlu_dev.jsonl", [row, {**row, "subject": "music"}])
    with pytest.raises(MlxSvdError, match=r"mmlu\.jsonl: line 1: 2 examples.*'law'.* has 1"):
        run(["mmlu"], tmp_path / "out", data_dir=tmp_path, num_fewshot=2)


def test_an_id_given_twice_is_refused_by_line(tmp_path):
    rows = [{**row, "id": "same"} if n in (2, 4) else row for n, row in enumerate(choice_rows())]
    with pytest.raises(MlxSvdError, match=r"twice\.jsonl: line 5: the id 'same' is given twice"):
        run([write(tmp_path / "twice.jsonl", rows)], tmp_path / "out")


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = write(tmp_path / "marked.jsonl", choice_rows())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert run([path], tmp_path / "out")["n-samples"]["marked"]["original"] == 10


def test_rows_that_are_not_in_the_data_folder_are_asked_for_by_name(tmp_path):
    with pytest.raises(MlxSvdError, match=r"piqa\.jsonl: no such file.*--data-dir"):
        run(["piqa"], tmp_path / "out", data_dir=tmp_path)


def test_bad_rows_of_a_later_task_are_found_before_the_first_is_scored(
    capitals, tmp_path, monkeypatch
):
    monkeypatch.setattr(Scorer, "score_batch", lambda *_: pytest.fail("scored"))
    with pytest.raises(MlxSvdError, match=r"piqa\.jsonl: no such file"):
        run([capitals, "piqa"], tmp_path / "out", data_dir=tmp_path)
    bad = tmp_path / "bad.jsonl"
    write(bad, [*choice_rows()[:2], {"question": "q", "choices": ["a", "b"], "label": 2}])
    with pytest.raises(MlxSvdError, match=r"bad\.jsonl: line 3"):
        run([capitals, bad], tmp_path / "out")
    with pytest.raises(MlxSvdError, match=r"prompts\.txt: cannot be read"):
        run([capitals, "generation"], tmp_path / "out", prompts=tmp_path / "prompts.txt")
    with pytest.raises(MlxSvdError, match="generation: a context of 100 tokens has no room"):
        run([capitals, "generation"], tmp_path / "out", max_length=100)
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_task_is_found_before_anything_is_scored(capitals, tmp_path, monkeypatch):
    run([capitals], tmp_path / "base")
    other = write(tmp_path / "other.jsonl", choice_rows()[:3])
    monkeypatch.setattr(Scorer, "score_batch", lambda *_: pytest.fail("scored"))
    with pytest.raises(MlxSvdError, match="base: holds no results of other"):
        run([capitals, other], tmp_path / "out", base=str(tmp_path / "base"))
