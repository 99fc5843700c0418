"""Whole evaluations on small local rows: results, samples, resumption, refusals."""

import csv
import io
import json
import math
import shutil

import numpy as np
import pytest

from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate import evaluate as evaluate_module
from mlx_svd.evaluate.evaluate import evaluate
from mlx_svd.evaluate.likelihood.scorer import Scorer
from mlx_svd.evaluate.settings import EvaluateSettings
from mlx_svd.evaluate.statistics.intervals import wilson

CAPITALS = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Russia", "Moscow"),
            ("Egypt", "Cairo"), ("Greece", "Athens"), ("Norway", "Oslo"), ("Peru", "Lima"),
            ("Cuba", "Havana"), ("Austria", "Vienna")]  # fmt: skip


def choice_rows():
    rows = []
    for n, (country, capital) in enumerate(CAPITALS):
        others = [c for _, c in CAPITALS if c != capital]
        choices = [others[n % 9], others[(n + 3) % 9]]
        choices.insert(n % 3, capital)
        question = f"The capital of {country} is"
        rows.append({"id": f"c{n}", "question": question, "choices": choices, "label": n % 3})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def run(tasks, output, **settings):
    settings = EvaluateSettings(**{"dtype": "float32", "batch_tokens": 16, **settings})
    return evaluate(str(DEMO_MODEL), [str(task) for task in tasks], output, settings)


@pytest.fixture
def capitals(tmp_path):
    return write(tmp_path / "capitals.jsonl", choice_rows())


def test_a_file_of_choices_is_a_task_without_code(capitals, tmp_path):
    results = run([capitals], tmp_path / "out")
    scores, interval = results["results"]["capitals"], results["intervals"]["capitals"]["acc"]
    records = read(tmp_path / "out/samples_capitals.jsonl")
    right = [float(np.argmax(r["log_likelihoods"]) == row["label"])
             for r, row in zip(records, choice_rows(), strict=True)]  # fmt: skip
    assert sum(right) >= 8, "the demo model was taught capitals"
    assert [record["acc"] for record in records] == right
    assert scores["acc,none"] == pytest.approx(np.mean(right))
    stderr = np.std(right, ddof=1) / math.sqrt(len(right))
    assert scores["acc_stderr,none"] == pytest.approx(stderr)
    low, high = wilson(int(sum(right)), 10)
    assert (interval["low"], interval["high"]) == (low, high)
    assert interval["chance"] == pytest.approx(1 / 3)
    assert not interval["at_chance"]


def test_a_file_of_answers_tells_whether_the_model_would_write_them(tmp_path):
    rows = [{"prompt": f"The capital of {c} is", "answer": a} for c, a in CAPITALS]
    rows.append({"prompt": "The capital of France is", "answer": "Ouagadougou"})
    results = run([write(tmp_path / "answers.jsonl", rows)], tmp_path / "out")
    records = read(tmp_path / "out/samples_answers.jsonl")
    assert records[-1]["acc"] == 0
    assert sum(r["acc"] for r in records) >= 8
    assert all(r["loglikelihood"] < 0 and r["num_tokens"] > 0 for r in records)
    assert results["results"]["answers"]["acc,none"] == np.mean([r["acc"] for r in records])


def test_results_have_lm_evals_keys_and_their_conditions(capitals, tmp_path):
    run([capitals], tmp_path / "out", limit=4)
    results = json.loads((tmp_path / "out/results.json").read_text())
    for key in ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples",
                "config", "date", "model_name", "task_hashes", "command",
                "total_evaluation_time_seconds"):  # fmt: skip
        assert key in results
    assert results["n-samples"]["capitals"] == {"original": 10, "effective": 4}
    assert results["n-shot"]["capitals"] == 0
    assert results["higher_is_better"]["capitals"] == {"acc": True, "acc_norm": True}
    assert len(results["config"]["model_sha"]) == 64
    assert results["peak_memory"]["process"] > 50e6
    assert results["versions_of_packages"]["mlx"]


def test_tables_hold_the_numbers_of_the_json(capitals, tmp_path):
    results = run([capitals], tmp_path / "out")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out/results.csv").read_text())))
    assert [row["metric"] for row in rows] == ["acc", "acc_norm"]
    for row in rows:
        value = results["results"]["capitals"][f"{row['metric']},none"]
        assert float(row["value"]) == value
        assert f"{value:.4f}" in (tmp_path / "out/results.md").read_text()


def test_a_score_whose_interval_holds_chance_is_marked(tmp_path):
    rows = [{**row, "label": (row["label"] + n % 3) % 3} for n, row in enumerate(choice_rows())]
    results = run([write(tmp_path / "mixed.jsonl", rows)], tmp_path / "out")
    assert results["intervals"]["mixed"]["acc"]["at_chance"]
    assert "chance" in (tmp_path / "out/results.md").read_text().splitlines()[2]


def test_a_score_that_lies_wholly_below_chance_is_marked(tmp_path):
    # Every label points at a wrong choice.
    rows = [{**row, "label": (row["label"] + 1) % 3} for row in choice_rows()]
    run([write(tmp_path / "wrong.jsonl", rows)], tmp_path / "out")
    assert "| below chance |" in (tmp_path / "out/results.md").read_text().splitlines()[2]


def test_an_id_given_twice_is_refused_by_line(tmp_path):
    rows = [{**row, "id": "same"} if n in (2, 4) else row for n, row in enumerate(choice_rows())]
    with pytest.raises(MlxSvdError, match=r"twice\.jsonl: line 5: the id 'same' is given twice"):
        run([write(tmp_path / "twice.jsonl", rows)], tmp_path / "out")


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = write(tmp_path / "marked.jsonl", choice_rows())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert run([path], tmp_path / "out")["n-samples"]["marked"]["original"] == 10


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


def test_a_finished_run_is_not_computed_again(capitals, tmp_path, monkeypatch):
    first = run([capitals], tmp_path / "out")
    monkeypatch.setattr(Scorer, "score_batch", lambda *_: pytest.fail("computed again"))
    assert run([capitals], tmp_path / "out")["results"] == first["results"]


def test_tasks_of_one_model_gather_in_one_folder(capitals, tmp_path):
    first = run([capitals], tmp_path / "out")
    other = write(tmp_path / "other.jsonl", choice_rows()[:3])
    results = run([other], tmp_path / "out")
    assert set(results["results"]) == set(results["intervals"]) == {"capitals", "other"}
    assert results["results"]["capitals"] == first["results"]["capitals"]
    assert json.loads((tmp_path / "out/results.json").read_text()) == results


def test_other_conditions_are_refused_and_named(capitals, tmp_path):
    run([capitals], tmp_path / "out", limit=4)
    with pytest.raises(MlxSvdError, match=r"another limit \(4, now 5\).*--output-dir"):
        run([capitals], tmp_path / "out", limit=5)
    write(capitals, choice_rows()[::-1])
    with pytest.raises(MlxSvdError, match="another data; give"):
        run([capitals], tmp_path / "out", limit=4)


def test_a_folder_with_another_model_or_dtype_is_refused_for_any_task(capitals, tmp_path):
    run([capitals], tmp_path / "out")
    other = write(tmp_path / "other.jsonl", choice_rows()[:3])
    with pytest.raises(MlxSvdError, match=r"another dtype \('float32', now None\)"):
        run([other], tmp_path / "out", dtype=None)
    copy = tmp_path / "copy"
    shutil.copytree(DEMO_MODEL, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"a": 1}))
    settings = EvaluateSettings(dtype="float32")
    with pytest.raises(MlxSvdError, match=r"conditions_capitals\.json: is of another model; give"):
        evaluate(str(copy), [str(other)], tmp_path / "out", settings)
    assert not (tmp_path / "out/samples_other.jsonl").exists()


def test_a_limit_says_what_interval_it_implies_and_no_limit_says_nothing(capitals, tmp_path):
    note = run([capitals], tmp_path / "limited", limit=5)["notes"]
    assert len(note) == 1
    assert note[0].startswith("capitals: 5 items: a score has an interval of about +-")
    assert run([capitals], tmp_path / "all")["notes"] == []


def test_a_damaged_line_in_the_middle_is_named(capitals, tmp_path):
    run([capitals], tmp_path / "out")
    path = tmp_path / "out/samples_capitals.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{\n" + "".join(lines[2:]))
    with pytest.raises(MlxSvdError, match=r"samples_capitals\.jsonl: line 2 is damaged"):
        run([capitals], tmp_path / "out")


def test_rows_are_the_first_ones_or_drawn_by_the_seed(capitals, tmp_path):
    def ids(name, **settings):
        run([capitals], tmp_path / name, limit=4, **settings)
        return [r["id"] for r in read(tmp_path / f"{name}/samples_capitals.jsonl")]

    assert ids("first") == ["c0", "c1", "c2", "c3"]
    one, same, other = (
        ids(name, random_rows=True, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == same != other
    assert len(set(one)) == 4


def test_a_prompt_longer_than_the_context_is_cut_counted_and_said(tmp_path):
    rows = choice_rows()
    rows[2]["question"] = "word " * 60 + rows[2]["question"]
    path = write(tmp_path / "long.jsonl", rows)
    results = run([path], tmp_path / "out", max_length=32)
    assert len(results["notes"]) == 1
    assert "long: 1 of 10 prompts are longer than the context of 32" in results["notes"][0]
    records = read(tmp_path / "out/samples_long.jsonl")
    assert [n for n, record in enumerate(records) if "truncated" in record] == [2]


def test_a_fact_whose_prompt_is_cut_is_counted_and_said(tmp_path):
    facts = [
        {
            "relation": "capital", "subject": country, "object": capital, "conflict": "Bern",
            "prompt": ("word " * 60 if n == 1 else "") + f"The capital of {country} is",
            "distractors": ["Quito"],
        }
        for n, (country, capital) in enumerate(CAPITALS[:3])
    ]  # fmt: skip
    (tmp_path / "known.json").write_text(json.dumps(facts))
    results = run([tmp_path / "known.json"], tmp_path / "out", max_length=32)
    assert "known: 1 of 3 prompts are longer than the context of 32" in results["notes"][0]
    records = read(tmp_path / "out/samples_known.jsonl")
    assert [n for n, record in enumerate(records) if "truncated" in record] == [1]


def test_examples_are_never_the_row_itself(capitals, tmp_path, monkeypatch):
    seen, original = [], evaluate_module.prepare

    def prepare(*arguments):
        job = original(*arguments)
        seen.append(job)
        return job

    monkeypatch.setattr(evaluate_module, "prepare", prepare)
    run([capitals], tmp_path / "out", num_fewshot=9)
    assert seen[0].shots == 9
    with pytest.raises(MlxSvdError, match=r"10 examples.*10 rows"):
        run([capitals], tmp_path / "more", num_fewshot=10)


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
    "missing": ({"question": "q"}, 'no object with choices and labels in "mc1_targets"'),
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


def test_an_unknown_task_offers_the_nearest_names(tmp_path):
    with pytest.raises(MlxSvdError, match=r"helaswag: no such task.*use hellaswag"):
        run(["helaswag"], tmp_path / "out")
    with pytest.raises(MlxSvdError, match=r"zzz.*hellaswag.*winogrande"):
        run(["zzz"], tmp_path / "out")


def test_a_task_is_not_scored_twice(capitals, tmp_path):
    with pytest.raises(MlxSvdError, match="capitals is given twice"):
        run([capitals, capitals], tmp_path / "out")
    with pytest.raises(MlxSvdError, match="names no task"):
        run([], tmp_path / "out")


def test_rows_that_are_not_in_the_data_folder_are_asked_for_by_name(tmp_path):
    with pytest.raises(MlxSvdError, match=r"piqa\.jsonl: no such file.*--data-dir"):
        run(["piqa"], tmp_path / "out", data_dir=tmp_path)


def test_a_subject_with_too_few_examples_is_named(tmp_path):
    row = {"question": "q", "subject": "law", "choices": list("abcd"), "label": 0}
    write(tmp_path / "mmlu.jsonl", [row])
    write(tmp_path / "mmlu_dev.jsonl", [row, {**row, "subject": "music"}])
    with pytest.raises(MlxSvdError, match=r"mmlu\.jsonl: line 1: 2 examples.*'law'.* has 1"):
        run(["mmlu"], tmp_path / "out", data_dir=tmp_path, num_fewshot=2)


def test_settings_out_of_range_are_refused():
    for settings, words in (
        ({"limit": 0}, "--limit 0"),
        ({"num_fewshot": -1}, "--num-fewshot -1"),
        ({"max_length": 1}, "--max-length 1"),
        ({"scoring": "substring"}, "--scoring substring"),
    ):
        with pytest.raises(MlxSvdError, match=words):
            EvaluateSettings(**settings)
