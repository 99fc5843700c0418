"""Records of generated texts, their numbers, and the gate on loops."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mlx_svd.checkpoint.loader import load
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.continuations import continuations
from mlx_svd.evaluate.generation import (
    GenerationSettings,
    generation_quality,
    generation_records,
    generation_texts,
)
from mlx_svd.evaluate.generation_gate import generation_gate
from mlx_svd.evaluate.generation_summary import generation_differences, generation_summary
from mlx_svd.evaluate.perplexity import perplexity
from mlx_svd.evaluate.prompts import Prompt, read_prompts
from mlx_svd.evaluate.repetition import distinct, loops, repetition
from mlx_svd.evaluate.statistics import estimate

SETTINGS = GenerationSettings(max_tokens=24, seeds=(0, 3))


@pytest.fixture(scope="module")
def demo():
    return load(DEMO_MODEL, dtype="float32")


@pytest.fixture(scope="module")
def quality(demo):
    return generation_quality(*demo, read_prompts(limit=12), SETTINGS)


def record(number, tokens, kind="greedy", seed=None, ended=0):
    """What generation_quality would write about a text with these tokens."""
    return {
        "doc_id": number, "id": f"p{number}", "task": "generation", "filter": kind, "seed": seed,
        "prompt": f"prompt {number}", "text": "", "tokens": tokens,
        **{f"rep_{n}": repetition(tokens, n) for n in (2, 3, 4)},
        "loop": int(loops(tokens)), "length": len(tokens), "ended": ended,
    }  # fmt: skip


def run(looping, n=200, kind="greedy", length=40):
    """n texts of random tokens of which the first ``looping`` end in a loop."""
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 5000, (n, length)).tolist()
    texts = [t[: length - 12] + [1, 2, 3, 4] * 3 if i < looping else t for i, t in enumerate(texts)]
    return [record(i, t, kind) for i, t in enumerate(texts)]


def test_every_prompt_has_a_greedy_record_and_one_for_each_seed(demo, quality):
    runs = [(r["filter"], r["seed"]) for r in quality.records]
    assert runs == [("greedy", None)] * 12 + [("sampled", 0)] * 12 + [("sampled", 3)] * 12
    assert [r["doc_id"] for r in quality.records] == list(range(36))
    assert [r["id"] for r in quality.records] == [p.id for p in read_prompts(limit=12)] * 3
    texts = {r["text"] for r in quality.records}
    assert len(texts) == 36


def test_a_record_holds_the_text_and_what_was_counted_on_its_tokens(demo, quality):
    _, tokenizer = demo
    for r in quality.records:
        assert r["text"] == tokenizer.decode(r["tokens"])
        assert r["length"] == len(r["tokens"])
        assert r["loop"] == loops(r["tokens"])
        assert [r[f"rep_{n}"] for n in (2, 3, 4)] == [repetition(r["tokens"], n) for n in (2, 3, 4)]
        assert all(name in r for name in r["metrics"])


def test_records_survive_json(quality):
    assert [json.loads(json.dumps(r)) for r in quality.records] == quality.records


def test_greedy_records_are_the_greedy_continuations(demo, quality):
    prompts = [demo[1].encode(p.text) for p in read_prompts(limit=12)]
    expected = continuations(*demo, prompts, max_tokens=24)
    assert [r["tokens"] for r in quality.records[:12]] == [c.tokens for c in expected]


def test_an_interrupted_run_continues_to_the_same_records(demo, quality):
    written = []
    known = [*quality.records[:5], *quality.records[14:20]]
    again = generation_quality(
        *demo, read_prompts(limit=12), replace(SETTINGS, batch_size=5), known=known,
        write=written.append,
    )  # fmt: skip
    assert again.records == quality.records
    assert len(written) == 36 - 11
    assert all(r not in known for r in written)


def test_summary_is_of_means_over_texts_with_prompts_as_items(quality):
    rows = quality.records[12:]
    for metric in ("rep_2", "rep_4", "loop", "length", "ended"):
        values = np.array([r[metric] for r in rows])
        expected = estimate(values, np.array([r["id"] for r in rows]))
        assert quality.summary[f"{metric},sampled"] == expected
    assert quality.summary["rep_3,sampled"].n == 12
    assert quality.summary["rep_3,sampled"].rows == 24
    found = quality.summary["distinct_2,sampled"]
    assert found.value == distinct([r["tokens"] for r in rows], 2).value
    assert found.low < found.value < found.high


def test_texts_too_short_for_a_metric_are_left_out_of_it_not_counted_as_good():
    records = [record(0, [1, 1, 1, 1]), record(1, []), record(2, [5])]
    summary = generation_summary(records)
    assert (summary["rep_2,greedy"].value, summary["rep_2,greedy"].n) == (pytest.approx(2 / 3), 1)
    assert summary["length,greedy"].value == pytest.approx(5 / 3)
    assert "rep_2,greedy" not in generation_summary(records[1:])
    assert "distinct_2,greedy" not in generation_summary(records[1:])


def test_differences_are_paired_by_prompt():
    base, model = run(20), run(50)
    found = generation_differences(base, model[::-1])
    assert found["loop,greedy"].value == pytest.approx(0.15)
    assert found["loop,greedy"].test == "McNemar"
    assert found["rep_3,greedy"].value == pytest.approx(
        np.mean([m["rep_3"] - b["rep_3"] for b, m in zip(base, model, strict=True)])
    )
    values = [distinct([r["tokens"] for r in rows], 2).value for rows in (base, model)]
    assert found["distinct_2,greedy"].value == pytest.approx(values[1] - values[0])
    assert found["distinct_2,greedy"].high < 0
    assert found["distinct_2,greedy"].method == "jackknife"


def test_gate_passes_equal_texts_and_fails_texts_that_loop():
    assert generation_gate(run(20), run(20)).verdict == "pass"
    gate = generation_gate(run(20), run(60))
    assert gate.verdict == "fail"
    assert gate.lines[0].startswith("fail: loop, greedy: 0.100 -> 0.300, difference +0.200 [")


def test_gate_fails_for_one_way_of_generating_alone():
    base = run(150) + run(2, kind="sampled")
    model = run(150) + run(40, kind="sampled")
    gate = generation_gate(base, model)
    assert {c.name: c.verdict for c in gate.checks} == {
        "loop,greedy": "pass", "loop,sampled": "fail",
    }  # fmt: skip
    assert gate.verdict == "fail"


def test_gate_on_few_prompts_is_undecided_and_says_how_few():
    gate = generation_gate(run(2, n=20), run(3, n=20))
    assert gate.verdict == "undecided"
    assert "20 prompts are too few" in gate.lines[0]


def test_gate_margin_and_metrics_can_be_chosen():
    assert generation_gate(run(20), run(60), margin=0.3).verdict == "pass"
    checks = generation_gate(run(20), run(60), metrics=("loop", "rep_2")).checks
    assert [c.name for c in checks] == ["rep_2,greedy", "loop,greedy"]


class LoopsWhenItReadsItself:
    """The demo model; but one token at a time, as in generation, it is far too sure of itself."""

    def __init__(self, model):
        self.model, self.layers = model, model.layers

    def __call__(self, tokens, cache=None):
        logits = self.model(tokens, cache=cache)
        return logits * 20 if tokens.shape[1] == 1 else logits


def test_gate_fails_a_model_whose_perplexity_is_fine_but_whose_text_loops(demo):
    model, tokenizer = demo
    damaged, prompts = LoopsWhenItReadsItself(model), read_prompts(limit=32)
    settings = GenerationSettings(modes=["sampled"], max_tokens=64)
    text = tokenizer.encode(" ".join(p.text for p in read_prompts()))
    before, after = (perplexity(m, text, window=128).perplexity for m in (model, damaged))
    assert after == pytest.approx(before, rel=1e-5)
    base, broken = (
        generation_quality(m, tokenizer, prompts, settings).records for m in (model, damaged)
    )
    assert generation_gate(base, broken).verdict == "fail"


def test_errors_name_the_prompt_by_its_id(demo):
    with pytest.raises(MlxSvdError, match="'long': 1100 tokens and 24 to generate do not fit"):
        generation_quality(*demo, [Prompt("long", " the" * 1100)], SETTINGS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modes": []}, "give greedy, sampled or both"),
        ({"modes": ["beam"]}, "give greedy, sampled or both"),
        ({"seeds": ()}, "at least one"),
        ({"seeds": (1, 1)}, "none twice"),
    ],
)
def test_settings_without_meaning_are_refused(change, words):
    with pytest.raises(MlxSvdError, match=words):
        GenerationSettings(**change)


def test_no_prompts_and_records_of_another_run_are_refused(demo, quality):
    with pytest.raises(MlxSvdError, match="no prompts"):
        generation_quality(*demo, [], SETTINGS)
    for prompts, settings in (
        ([Prompt("prompt-1", "Another text")], SETTINGS),
        (read_prompts(limit=12), replace(SETTINGS, seeds=(1, 3))),
        (read_prompts(limit=12), replace(SETTINGS, modes=["sampled"])),
        (read_prompts(limit=12), replace(SETTINGS, max_tokens=25)),
        (read_prompts(limit=12), replace(SETTINGS, temp=0.5)),
    ):
        with pytest.raises(MlxSvdError, match=r"known record .* has another"):
            generation_quality(*demo, prompts, settings, known=quality.records)


def test_batches_of_texts_can_be_generated_one_by_one_in_any_order(demo, quality):
    settings = replace(SETTINGS, batch_size=7)
    batches = generation_texts(read_prompts(limit=12), settings)
    assert max(map(len, batches)) == 7
    assert all(len({(t.mode, t.seed) for t in batch}) == 1 for batch in batches)
    found = [r for batch in reversed(batches) for r in generation_records(*demo, batch, settings)]
    assert sorted(found, key=lambda r: r["doc_id"]) == quality.records


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"margin": -0.1}, "gate margin"),
        ({"metrics": ["length"]}, "gate metrics"),
        ({"records": run(2, n=19)}, "1 only in A"),
    ],
)
def test_what_cannot_be_gated_is_refused(change, words):
    call = {"records": run(2, n=20), **change}
    with pytest.raises(MlxSvdError, match=words):
        generation_gate(run(2, n=20), **call)


def test_texts_too_short_for_every_gate_metric_are_refused():
    short = [record(i, [1]) for i in range(5)]
    with pytest.raises(MlxSvdError, match="no text is long enough for rep_2"):
        generation_gate(short, short, metrics=["rep_2"])
