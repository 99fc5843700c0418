"""Whole evaluations on small local rows: scores, tables, truncation, refusals."""

import csv
import io
import json
import math

import numpy as np
import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate import evaluate as evaluate_module
from mlx_svd.evaluate.settings import EvaluateSettings
from mlx_svd.evaluate.statistics.intervals import wilson
from tests.evaluate.capitals import CAPITALS, choice_rows, read, run, write


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


def test_a_limit_says_what_interval_it_implies_and_no_limit_says_nothing(capitals, tmp_path):
    note = run([capitals], tmp_path / "limited", limit=5)["notes"]
    assert len(note) == 1
    assert note[0].startswith("capitals: n = 5: a score has an interval of about +-")
    assert run([capitals], tmp_path / "all")["notes"] == []


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
    seen, original = [], evaluate_module.read_rows

    def read_rows(*arguments):
        def prepare(bench):
            seen.append(original(*arguments)(bench))
            return seen[-1]

        return prepare

    monkeypatch.setattr(evaluate_module, "read_rows", read_rows)
    run([capitals], tmp_path / "out", num_fewshot=9)
    assert seen[0].shots == 9
    with pytest.raises(MlxSvdError, match=r"10 examples.*10 rows"):
        run([capitals], tmp_path / "more", num_fewshot=10)


def test_an_unknown_task_offers_the_nearest_names(tmp_path):
    with pytest.raises(MlxSvdError, match=r"helaswag: no such task.*use hellaswag"):
        run(["helaswag"], tmp_path / "out")
    with pytest.raises(MlxSvdError, match=r"zzz.*hellaswag.*winogrande"):
        run(["zzz"], tmp_path / "out")


def test_a_task_is_not_scored_twice(capitals, tmp_path):
    with pytest.raises(MlxSvdError, match="capitals is given twice"):
        run([capitals, capitals], tmp_path / "out")
    (tmp_path / "own").mkdir()
    part = write(tmp_path / "own/mmlu.jsonl", choice_rows())
    with pytest.raises(MlxSvdError, match=r"mmlu\.jsonl: the task mmlu is given twice"):
        run(["composite", part], tmp_path / "out", data_dir=tmp_path)
    with pytest.raises(MlxSvdError, match="names no task"):
        run([], tmp_path / "out")


def test_settings_out_of_range_are_refused():
    for settings, words in (
        ({"limit": 0}, "--limit 0"),
        ({"num_fewshot": -1}, "--num-fewshot -1"),
        ({"max_length": 1}, "--max-length 1"),
        ({"scoring": "substring"}, "--scoring substring"),
    ):
        with pytest.raises(MlxSvdError, match=words):
            EvaluateSettings(**settings)


def test_an_interval_holds_nothing_that_a_number_cannot_be(tmp_path):
    targets = {"choices": ["a fish", "the sea", "a stone"], "labels": [1, 1, 0]}
    row = {"question": "What lives in water?", "mc2_targets": targets}
    rows = [{**row, "id": str(n), "question": "why " * n + "?"} for n in range(3)]
    write(tmp_path / "truthfulqa_mc.jsonl", [r | {"mc1_targets": targets} for r in rows])
    answers = write(tmp_path / "two.jsonl", [
        {"prompt": "The capital of France is", "answer": answer} for answer in ("Paris", "Oslo")
    ])  # fmt: skip
    tasks = ["truthfulqa_mc2", answers]
    found = run(tasks, tmp_path / "out", data_dir=tmp_path)["intervals"]
    assert 0 <= found["truthfulqa_mc2"]["acc"]["low"] < found["truthfulqa_mc2"]["acc"]["high"] <= 1
    assert found["two"]["loglikelihood"]["high"] == 0, "two items are far apart"
