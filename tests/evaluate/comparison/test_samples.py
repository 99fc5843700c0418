"""Result folders are read whole or refused by file and line."""

import json

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.comparison.samples import read_run
from tests.evaluate.result_folders import answers, write_lm_eval_run, write_run


def test_tasks_rows_and_results_are_read(tmp_path):
    rows = answers([1, 0])
    run = read_run(write_run(tmp_path / "a", {"piqa": rows, "arc_easy": rows[:1]}))
    assert run.tasks["piqa"] == [{"task": "piqa", **row} for row in rows]
    assert list(run.tasks) == ["arc_easy", "piqa"]
    assert run.model == "a"
    assert run.data_hash("piqa") is None


def test_a_folder_of_lm_eval_has_its_files_below_and_dated(tmp_path):
    run = read_run(write_lm_eval_run(tmp_path / "out", [1, 0], [-3.0]))
    assert list(run.tasks) == ["my_piqa", "mytext"]
    assert run.model == "model"
    assert run.data_hash("my_piqa") == "x"
    assert run.of_task("n-shot", "mytext") == 0


def test_of_several_runs_the_newest_is_read_and_that_is_said(tmp_path):
    write_lm_eval_run(tmp_path, [1, 1], [-3.0], date="2026-01-31T10-20-30.123456")
    write_lm_eval_run(tmp_path, [0, 0], [-3.0], date="2026-02-01T00-00-00.000000")
    run = read_run(tmp_path)
    assert [row["acc"] for row in run.tasks["my_piqa"]] == [0, 0]
    assert len(run.notes) == 2
    assert "2 runs of my_piqa; the newest was read: samples_my_piqa_2026-02-01" in run.notes[0]


def test_folders_that_are_no_run_are_refused_by_name(tmp_path):
    for folder, words in ((tmp_path / "none", "no such folder"), (tmp_path, "holds no samples")):
        with pytest.raises(MlxSvdError, match=words) as error:
            read_run(folder)
        assert str(folder) in str(error.value)


def test_several_models_in_one_folder_are_refused(tmp_path):
    for model in ("one", "two"):
        write_lm_eval_run(tmp_path, [1], [-1.0], model=model)
    with pytest.raises(MlxSvdError, match=r"several runs .*one, .*two"):
        read_run(tmp_path)


def test_a_run_without_results_did_not_finish(tmp_path):
    folder = write_run(tmp_path / "a", {"piqa": answers([1])})
    (folder / "results_1.json").unlink()
    with pytest.raises(MlxSvdError, match="did not finish"):
        read_run(folder)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"piqa": {"effective": 3}}, "holds 2 rows of piqa, results.json counts 3"),
        ({}, "holds 2 rows of piqa, results.json counts none"),
    ],
)
def test_rows_that_the_results_do_not_count_are_of_a_run_that_was_killed(counts, words, tmp_path):
    keys = {"model_source": "mlx-svd", "n-samples": counts}
    folder = write_run(tmp_path / "a", {"piqa": answers([1, 0])}, **keys)
    with pytest.raises(MlxSvdError, match=f"{words}.*did not finish"):
        read_run(folder)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"doc_id": 0, "ac', "line 2 is not JSON"),
        ("[1]", 'line 2 has neither "id" nor "doc_id"'),
        ('{"acc": 1}', 'line 2 has neither "id" nor "doc_id"'),
        ('{"doc_id": 0, "task": "mmlu"}', "line 2 belongs to the task 'mmlu'"),
    ],
)
def test_bad_rows_are_refused_by_file_and_line(tmp_path, line, words):
    folder = write_run(tmp_path / "a", {"piqa": answers([1])})
    path = folder / "samples_piqa.jsonl"
    path.write_text(path.read_text() + line)
    with pytest.raises(MlxSvdError, match=words) as error:
        read_run(folder)
    assert str(path) in str(error.value)


def test_empty_and_binary_samples_and_damaged_results_are_refused(tmp_path):
    folder = write_run(tmp_path / "a", {"piqa": []})
    with pytest.raises(MlxSvdError, match=r"samples_piqa\.jsonl: holds no rows"):
        read_run(folder)
    (folder / "samples_piqa.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(MlxSvdError, match=r"samples_piqa\.jsonl: cannot be read as text"):
        read_run(folder)
    for content, words in (("{", "cannot be read as JSON"), (json.dumps([]), "no JSON object")):
        (folder / "results_1.json").write_text(content)
        with pytest.raises(MlxSvdError, match=rf"results_1\.json.* {words}"):
            read_run(folder)
