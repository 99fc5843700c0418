"""The same numbers as lm-eval 0.4.13 on the same rows, through mlx_lm's own adapter."""

import json
from pathlib import Path

import pytest

from mlx_svd.evaluate.evaluate import evaluate
from mlx_svd.evaluate.settings import EvaluateSettings
from tests.evaluate import lm_eval_reference as reference

MULTIPLE_CHOICE = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "mmlu", "winogrande")
TRUTHFUL = ("truthfulqa_mc1", "truthfulqa_mc2")
# Of one choice, in nats. MLX's float32 softmax on x86 is off by about 1e-5 a token, so very long
# choices may differ by more: that is the adapter's rounding (see the last test).
LIMIT, LIMIT_PER_TOKEN = 1e-3, 3e-5
WINOGRANDE = [
    ("Sarah was a better surgeon than Maria so _ always got the easier cases.", 1),
    ("Ann asked Ruth the time because _ had forgotten her watch.", 0),
    ("The cup did not fit into the box because the _ was too small.", 1),
    ("John thanked Paul since _ had helped him with the harvest.", 1),
    ("The farmer fed the horse before the cow as the _ was hungrier.", 0),
    ("Rome was larger than Athens, so _ needed more grain.", 0),
    ("Peter paid Henry because _ had sold him the boat.", 1),
]
NAMES = [("Sarah", "Maria"), ("Ann", "Ruth"), ("cup", "box"), ("John", "Paul"), ("horse", "cow"),
         ("Rome", "Athens"), ("Peter", "Henry")]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(shared):
    return reference.adapter(shared / "models/qwen2-6m")


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    """lm-eval reads local files with the datasets package, which keeps copies."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        datasets.disable_progress_bars()
        yield


def make_data(shared: Path, folder: Path, count: int) -> Path:
    data = reference.trim(shared / "data/mc", folder, count, ("world_religions",))
    rows = [
        {"id": str(n), "question": question, "choices": names, "label": label}
        for n, ((question, label), names) in enumerate(zip(WINOGRANDE, NAMES, strict=True))
    ]
    (data / "winogrande.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def read_samples(folder: Path, task: str) -> list[dict]:
    text = (folder / f"samples_{task}.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n") if line]


def compare(shared, lm, tmp_path, count, shots, seed=1234, limit=LIMIT, model="qwen2-6m") -> float:
    """Largest difference of a choice's log-likelihood; everything else must be equal. Rows whose
    prompt is longer than the context are left out: mlx_lm's adapter does not cut them."""
    data = make_data(shared, tmp_path / "data", count)
    names = reference.write_tasks(tmp_path / "tasks", data, shots)
    expected = reference.run(lm, tmp_path / "tasks", names, shots, seed)
    output = tmp_path / "out"
    settings = EvaluateSettings(num_fewshot=shots, data_dir=data, dtype="float32", seed=seed)
    tasks = [name.removeprefix("local_") for name in names]
    found = evaluate(str(shared / "models" / model), tasks, output, settings)
    worst = 0.0
    for task in tasks:
        ours = read_samples(output, task)
        documents = [sample["doc_id"] for sample in ours]
        assert documents == sorted(documents)
        result = reference.agreement(ours, expected["samples"][f"local_{task}"])
        assert result.rows > 0, task
        assert result.left_out <= len(ours) // 10, task
        assert result.largest <= limit, (task, result)
        assert result.other_scores == 0, (task, result)
        worst = max(worst, result.largest)
        for key, value in found["results"][task].items():
            if key.endswith(",none") and "stderr" not in key and not result.left_out:
                assert value == pytest.approx(
                    expected["results"][f"local_{task}"][key], abs=1e-4
                ), (task, key)
    return worst


def test_zero_shot_numbers_are_lm_evals(shared, adapter, tmp_path):
    compare(shared, adapter, tmp_path, count=6, shots=0)


def test_five_shot_numbers_are_lm_evals(shared, adapter, tmp_path):
    compare(shared, adapter, tmp_path, count=6, shots=5)


def test_another_seed_draws_other_examples_and_the_same_as_lm_eval(shared, adapter, tmp_path):
    compare(shared, adapter, tmp_path, count=4, shots=2, seed=7)
    records = read_samples(tmp_path / "out", "piqa")
    settings = EvaluateSettings(num_fewshot=2, data_dir=tmp_path / "data", dtype="float32")
    evaluate(str(shared / "models/qwen2-6m"), ["piqa"], tmp_path / "other", settings)
    others = read_samples(tmp_path / "other", "piqa")
    assert [r["log_likelihoods"] for r in records] != [r["log_likelihoods"] for r in others]


@pytest.mark.reference
@pytest.mark.parametrize("shots", [0, 5])
def test_hundred_rows_of_every_task_are_lm_evals(shared, adapter, tmp_path, shots):
    limit = LIMIT + 150 * LIMIT_PER_TOKEN
    assert compare(shared, adapter, tmp_path, count=100, shots=shots, limit=limit) < limit


@pytest.mark.reference
@pytest.mark.parametrize(("model", "shots", "count"), [("llama-44m", 0, 8), ("qwen2-16m", 5, 6)])
def test_log_likelihoods_of_long_choices_are_lm_evals_on_transformers(
    shared, tmp_path, model, shots, count
):
    """Without the rounding of mlx_lm's adapter every choice is within 1e-3."""
    lm = reference.on_transformers(shared / "models" / model)
    compare(shared, lm, tmp_path, count, shots, model=model)
