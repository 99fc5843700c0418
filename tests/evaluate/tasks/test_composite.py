"""Reasoning, and the composite that it is a part of."""

import math

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.comparison.compare import compare
from mlx_svd.evaluate.jobs.job import Score
from mlx_svd.evaluate.tasks.composite import composite
from mlx_svd.evaluate.tasks.reasoning import questions
from tests.evaluate.tasks.material import read, run


def test_prompts_of_generated_answers_that_are_cut_are_counted(tmp_path, demo):
    results = run(["reasoning"], tmp_path / "out", max_length=32, limit=40)
    lengths = [len(demo[1].encode(prompt)) for prompt, _ in questions()[:40]]
    records = read(tmp_path / "out/samples_reasoning.jsonl")
    assert [r.get("truncated", 0) for r in records] == [max(0, n - 20) for n in lengths]
    longer = sum(n > 20 for n in lengths)
    assert 0 < longer < 40
    assert results["notes"] == [
        f"reasoning: {longer} of 40 prompts are longer than the context of 32 tokens and lost "
        f"their beginning (at most {max(lengths) - 20} tokens)"
    ]
    with pytest.raises(MlxSvdError, match="a context of 12 tokens has no room"):
        run(["reasoning"], tmp_path / "short", max_length=12)


def test_reasoning_has_answers_that_follow_from_its_questions():
    made = questions()
    assert made == questions()
    assert len(made) == 120
    for prompt, answer in made:
        numbers = [int(word) for word in prompt.replace(",", "").split() if word.isdigit()]
        if "gets" in prompt:
            assert int(answer) == sum(numbers)
        elif "next number" in prompt:
            assert int(answer) == 2 * numbers[3] - numbers[2]
        elif "today" not in prompt:
            assert prompt.startswith(answer)


def test_the_composite_weighs_its_parts_and_adds_their_variances():
    def score(value, error, low, high):
        return Score(value, error, low, high, 10)

    scores = {
        "facts": {"exact_match": score(0.5, 0.03, 0.4, 0.6)},
        "mmlu": {"acc": score(0.25, 0.02, 0.2, 0.35)},
        "reasoning": {"exact_match": score(1.0, 0.0, 0.7, 1.0)},
    }
    found = composite(scores)
    assert found.value == pytest.approx(0.4 * 0.5 + 0.4 * 0.25 + 0.2)
    assert found.stderr == pytest.approx(math.hypot(0.4 * 0.03, 0.4 * 0.02))
    # What is all right is no certainty: its own interval counts.
    assert found.low == pytest.approx(0.5 - math.hypot(0.4 * 0.1, 0.4 * 0.05, 0.2 * 0.3))
    assert found.high == pytest.approx(0.5 + math.hypot(0.4 * 0.1, 0.4 * 0.1))


def test_the_composite_runs_its_parts(data, tmp_path, shared):
    for name in ("mmlu", "mmlu_dev"):
        source = (shared / f"data/mc/{name}.jsonl").read_text().split("\n")
        (data / f"{name}.jsonl").write_text("\n".join(source[:4]) + "\n")
    results = run(["composite"], tmp_path / "out", data_dir=data, limit=4)
    parts = results["results"]
    assert set(parts) == {"facts", "mmlu", "reasoning", "composite"}
    expected = 0.4 * parts["facts"]["exact_match,none"] + 0.4 * parts["mmlu"]["acc,none"]
    expected += 0.2 * parts["reasoning"]["exact_match,none"]
    assert parts["composite"]["composite,none"] == pytest.approx(expected)
    notes = compare(tmp_path / "out", tmp_path / "out").notes
    assert notes == ["composite: not compared, it has no items of its own"]
