"""The generation task, and a comparison of two runs made by ``evaluate`` itself."""

import json
from dataclasses import replace

import pytest

from mlx_svd.checkpoint.loader import load
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.comparison.compare import compare
from mlx_svd.evaluate.evaluate import evaluate
from mlx_svd.evaluate.generation.continuations import continuations
from mlx_svd.evaluate.generation.prompts import read_prompts
from mlx_svd.evaluate.generation.quality import GenerationSettings, generation_quality
from mlx_svd.evaluate.settings import EvaluateSettings
from tests.evaluate.capitals import choice_rows, write

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


def test_the_base_model_is_evaluated_on_every_task_so_that_loops_and_perplexity_are_compared(
    material, tmp_path, shared
):
    (material / "text.txt").write_text("The old man walked to the sea. " * 60)
    settings = EvaluateSettings(
        dtype="float32", prompts=material / "prompts.txt", limit=2, base=str(DEMO_MODEL)
    )
    tasks = ["generation", "reasoning", "kl", str(material / "text.txt")]
    (material / "wikitext-2.test.txt").write_text("The old man walked to the sea. " * 200)
    settings = replace(settings, data_dir=material)
    evaluate(str(shared / "models/qwen2-16m"), tasks, tmp_path / "out", settings)
    base = tmp_path / "out/base" / DEMO_MODEL.name
    alone = evaluate(
        str(DEMO_MODEL), [t for t in tasks if t != "kl"], tmp_path / "alone",
        replace(settings, base=None),
    )  # fmt: skip
    assert json.loads((base / "results.json").read_text())["results"] == alone["results"]
    found = compare(base, tmp_path / "out")
    assert {row.task for row in found.rows} == {"generation", "reasoning", "text"}
    assert found.gate is not None
    assert any("only in B: kl" in note for note in found.notes)


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


def test_a_prompt_that_does_not_fit_is_cut_to_its_end_counted_and_said(material, tmp_path):
    long = tmp_path / "prompts.txt"
    long.write_text("In the garden of the house\n" + "the sea and " * 9 + "In the garden of\n")
    settings = EvaluateSettings(dtype="float32", prompts=long, max_length=128 + 5)
    found = evaluate(str(DEMO_MODEL), ["generation"], tmp_path / "out", settings)
    model, tokenizer = load(DEMO_MODEL, dtype="float32")
    lost = [len(tokenizer.encode(line)) - 5 for line in long.read_text().splitlines()]
    assert lost[0] > 0 or lost[1] > 0
    lines = (tmp_path / "out/samples_generation.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r.get("truncated", 0) for r in records] == [max(0, n) for n in (*lost, *lost)]
    assert "prompts are longer than the context of 133 tokens" in found["notes"][0]
    end = [tokenizer.encode(line)[-5:] for line in long.read_text().splitlines()]
    alone = continuations(model, tokenizer, end, max_tokens=128)
    assert [r["tokens"] for r in records[:2]] == [c.tokens for c in alone], "greedy"


def test_a_context_without_room_for_a_prompt_is_refused(material, tmp_path):
    with pytest.raises(MlxSvdError, match="a context of 128 tokens has no room"):
        run(material, tmp_path / "out", max_length=128)
