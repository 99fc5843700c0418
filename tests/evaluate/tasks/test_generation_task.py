"""The generation task, and a comparison of two runs made by ``evaluate`` itself."""

import json

import pytest

from mlx_svd.checkpoint.loader import load
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.evaluate.comparison.compare import compare
from mlx_svd.evaluate.evaluate import evaluate
from mlx_svd.evaluate.generation.prompts import read_prompts
from mlx_svd.evaluate.generation.quality import GenerationSettings, generation_quality
from mlx_svd.evaluate.settings import EvaluateSettings
from tests.evaluate.test_evaluate import choice_rows, write

PROMPTS = ("It was a dark night, and", "The old man said that", "In the garden of the house")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    write(folder / "capitals.jsonl", choice_rows())
    return folder


def run(material, output, model=DEMO_MODEL, **settings):
    settings = {"dtype": "float32", "prompts": material / "prompts.txt", "seed": 5, **settings}
    tasks = ["generation", str(material / "capitals.jsonl")]
    return evaluate(str(model), tasks, output, EvaluateSettings(**settings))


@pytest.fixture(scope="module")
def dense(material, tmp_path_factory):
    output = tmp_path_factory.mktemp("dense") / "out"
    return output, run(material, output)


def test_the_task_gives_what_the_library_function_gives(material, dense):
    output, results = dense
    model, tokenizer = load(DEMO_MODEL, dtype="float32")
    settings = GenerationSettings(seeds=(5,), chat=False)
    expected = generation_quality(
        model, tokenizer, read_prompts(material / "prompts.txt"), settings
    )
    lines = (output / "samples_generation.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert texts == [record["text"] for record in expected.records]
    for name, value in expected.summary.items():
        metric, kind = name.split(",")
        assert results["results"]["generation"][name] == pytest.approx(value.value)
        assert f"{metric}_stderr,{kind}" in results["results"]["generation"]
        interval = results["intervals"]["generation"][name]
        assert (interval["low"], interval["high"]) == pytest.approx((value.low, value.high))
    assert results["higher_is_better"]["generation"]["loop,greedy"] is False
    assert results["higher_is_better"]["generation"]["distinct_1,greedy"] is True
    assert "loop,greedy" in (output / "results.md").read_text()


def test_a_run_that_was_stopped_goes_on_with_the_texts_that_are_missing(material, dense, tmp_path):
    output, _ = dense
    again = tmp_path / "again"
    again.mkdir()
    lines = (output / "samples_generation.jsonl").read_text().splitlines(keepends=True)
    (again / "samples_generation.jsonl").write_text("".join(lines[:2]))
    name = "conditions_generation.json"
    (again / name).write_text((output / name).read_text())
    run(material, again)
    assert (again / "samples_generation.jsonl").read_text() == "".join(lines)


def test_two_runs_of_evaluate_are_compared_and_gated(material, dense, shared, tmp_path):
    output, _ = dense
    run(material, tmp_path / "b", model=shared / "models/gpt2-14m")
    found = compare(output, tmp_path / "b")
    rows = {(row.task, row.metric) for row in found.rows}
    assert ("capitals", "acc") in rows
    assert ("generation", "loop,greedy") in rows
    assert found.gate is not None
    same = compare(output, output)
    assert all(row.difference.value == 0 for row in same.rows)
