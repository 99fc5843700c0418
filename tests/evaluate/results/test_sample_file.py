"""A killed run goes on, and only with records that are its own."""

import json
import re

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.scorer import Scorer
from tests.evaluate.capitals import choice_rows, read, run, write


class Killed(BaseException):
    """Nothing in the program catches it, as nothing catches a kill."""


def run_and_kill_after(batches, capitals, output, monkeypatch):
    original, count = Scorer.score_batch, 0

    def score_batch(self, items, batch):
        nonlocal count
        if count == batches:
            raise Killed
        count += 1
        return original(self, items, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score_batch", score_batch)
        with pytest.raises(Killed):
            run([capitals], output)


@pytest.mark.parametrize("torn", [b"", b'{"doc_id": 3, "id": "c3", "ta', b"whole"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(capitals, tmp_path, torn, monkeypatch):
    run([capitals], tmp_path / "whole")
    expected = (tmp_path / "whole/samples_capitals.jsonl").read_bytes()
    output = tmp_path / "killed"
    run_and_kill_after(2, capitals, output, monkeypatch)
    path = output / "samples_capitals.jsonl"
    left = path.read_bytes()
    assert 0 < left.count(b"\n") < 10
    if torn == b"whole":  # the line is complete, its end was not written
        path.write_bytes(left[:-1])
    else:
        path.write_bytes(left + torn)
    calls, original = [], Scorer.score_batch

    def score_batch(self, items, batch):
        calls.append(batch.items)
        return original(self, items, batch)

    monkeypatch.setattr(Scorer, "score_batch", score_batch)
    results = run([capitals], output)
    assert path.read_bytes() == expected
    done = {record["doc_id"] for record in map(json.loads, left.splitlines())}
    assert calls
    assert not done & {i for batch in calls for i in batch}, "complete batches are not repeated"
    assert results["n-samples"]["capitals"]["effective"] == 10
    assert results["items_scored"]["capitals"] == 10 - len(done)


def test_a_finished_run_is_not_computed_again(capitals, tmp_path, monkeypatch):
    first = run([capitals], tmp_path / "out")
    monkeypatch.setattr(Scorer, "score_batch", lambda *_: pytest.fail("computed again"))
    again = run([capitals], tmp_path / "out")
    assert again["results"] == first["results"]
    assert again["items_scored"] == first["items_scored"] == {"capitals": 10}
    assert again["task_seconds"] == first["task_seconds"]


def test_other_conditions_are_refused_and_named(capitals, tmp_path):
    run([capitals], tmp_path / "out", limit=4)
    with pytest.raises(MlxSvdError, match=r"another limit \(4, now 5\).*--output-dir"):
        run([capitals], tmp_path / "out", limit=5)
    write(capitals, choice_rows()[::-1])
    with pytest.raises(MlxSvdError, match="another data; give"):
        run([capitals], tmp_path / "out", limit=4)


def test_a_damaged_line_in_the_middle_is_named(capitals, tmp_path):
    run([capitals], tmp_path / "out")
    path = tmp_path / "out/samples_capitals.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{\n" + "".join(lines[2:]))
    with pytest.raises(MlxSvdError, match=r"samples_capitals\.jsonl: line 2 is damaged"):
        run([capitals], tmp_path / "out")


# change of the record -> words of the message
DAMAGE = {
    "a text": ({"acc": "yes"}, "has 'yes' as 'acc'"),
    "not finite": ({"acc": float("nan")}, "has nan as 'acc'"),
    "missing": ({"acc_norm": None}, "has None as 'acc_norm'"),
    "another document": ({"doc_id": 99}, "has the doc_id 99, which is not of this run"),
    "no document": ({"doc_id": "3"}, "has the doc_id '3'"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_record_that_was_changed_by_hand_is_named_and_scored_again_without_its_line(
    case, capitals, tmp_path
):
    run([capitals], tmp_path / "out")
    path = tmp_path / "out/samples_capitals.jsonl"
    expected, records = path.read_bytes(), read(path)
    change, words = DAMAGE[case]
    records[3] |= change
    write(path, records)
    said = rf"samples_capitals\.jsonl: line 4 {re.escape(words)}.*delete that line"
    with pytest.raises(MlxSvdError, match=said):
        run([capitals], tmp_path / "out")
    write(path, records[:3] + records[4:])
    run([capitals], tmp_path / "out")
    assert path.read_bytes() == expected


def test_a_record_without_a_metric_is_named(tmp_path):
    (tmp_path / "story.txt").write_text("The old man went to the sea. " * 40)
    run([tmp_path / "story.txt"], tmp_path / "out", max_length=64)
    path = tmp_path / "out/samples_story.jsonl"
    records = read(path)
    del records[1]["num_tokens"]
    write(path, records)
    with pytest.raises(MlxSvdError, match=r"samples_story\.jsonl: line 2 lacks 'num_tokens'"):
        run([tmp_path / "story.txt"], tmp_path / "out", max_length=64)
