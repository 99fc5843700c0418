"""A result folder is of one model and one run at a time, and its JSON is strict."""

import fcntl
import json
import os
import shutil

import pytest

from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.evaluate import evaluate
from mlx_svd.evaluate.settings import EvaluateSettings
from tests.evaluate.capitals import choice_rows, run, write


def test_tasks_of_one_model_gather_in_one_folder(capitals, tmp_path):
    first = run([capitals], tmp_path / "out")
    other = write(tmp_path / "other.jsonl", choice_rows()[:3])
    results = run([other], tmp_path / "out")
    assert set(results["results"]) == set(results["intervals"]) == {"capitals", "other"}
    assert results["results"]["capitals"] == first["results"]["capitals"]
    assert json.loads((tmp_path / "out/results.json").read_text()) == results


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


def test_results_of_another_model_are_refused_without_their_conditions_too(capitals, tmp_path):
    run([capitals], tmp_path / "out")
    before = (tmp_path / "out/results.json").read_bytes()
    for path in (tmp_path / "out").glob("*_capitals.json*"):
        path.unlink()
    other = write(tmp_path / "other.jsonl", choice_rows()[:3])
    with pytest.raises(MlxSvdError, match=r"results\.json: is of another model or dtype; give"):
        run([other], tmp_path / "out", dtype=None)
    assert (tmp_path / "out/results.json").read_bytes() == before
    (tmp_path / "out/results.json").write_text("{}")
    with pytest.raises(MlxSvdError, match=r"results\.json: is no result of this version"):
        run([other], tmp_path / "out")


def test_every_task_keeps_the_settings_of_its_own_run(capitals, tmp_path):
    run([capitals], tmp_path / "out", limit=4, num_fewshot=2)
    other = write(tmp_path / "other.jsonl", choice_rows()[:3])
    settings = run([other], tmp_path / "out", limit=2)["task_settings"]
    assert [settings[t]["limit"] for t in ("capitals", "other")] == [4, 2]
    assert [settings[t]["num_fewshot"] for t in ("capitals", "other")] == [2, 0]


def test_a_folder_in_which_another_run_writes_is_refused(capitals, tmp_path):
    (tmp_path / "out").mkdir()
    other = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(MlxSvdError, match="out: another run of mlx-svd evaluate writes here"):
        run([capitals], tmp_path / "out")
    os.close(other)
    run([capitals], tmp_path / "out")


def test_one_item_has_no_interval_and_strict_json_says_so(tmp_path):
    (tmp_path / "story.txt").write_text("The old man went to the sea. " * 4)
    row = {"prompt": "The capital of France is", "answer": "Paris"}
    tasks = [tmp_path / "story.txt", write(tmp_path / "one.jsonl", [row])]
    run(tasks, tmp_path / "out")

    def strict(constant):
        pytest.fail(f"{constant} is no JSON")

    text = (tmp_path / "out/results.json").read_text()
    results = json.loads(text, parse_constant=strict)
    assert results["intervals"]["one"]["loglikelihood"]["low"] is None
    assert results["intervals"]["story"]["token_perplexity"]["high"] is None
    assert results["results"]["story"]["token_perplexity_stderr,none"] == "N/A"
    table = (tmp_path / "out/results.md").read_text()
    assert "– ∞ | - |" in table
