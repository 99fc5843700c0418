"""Records of generated texts: what is generated, counted, continued and refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mlx_svd.checkpoint.loader import load
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.generation.continuations import continuations
from mlx_svd.evaluate.generation.prompts import Prompt, read_prompts
from mlx_svd.evaluate.generation.quality import (
    GenerationSettings,
    generation_quality,
    generation_records,
    generation_texts,
)
from mlx_svd.evaluate.generation.repetition import distinct, loops, repetition
from mlx_svd.evaluate.statistics.intervals import estimate

SETTINGS = GenerationSettings(max_tokens=24, seeds=(0, 3))


@pytest.fixture(scope="module")
def demo():
    return load(DEMO_MODEL, dtype="float32")


@pytest.fixture(scope="module")
def quality(demo):
    return generation_quality(*demo, read_prompts(limit=12), SETTINGS)


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
        bounds = (0, np.inf if metric == "length" else 1)
        expected = estimate(values, np.array([r["id"] for r in rows]), bounds)
        assert quality.summary[f"{metric},sampled"] == expected
    assert quality.summary["rep_3,sampled"].n == 12
    assert quality.summary["rep_3,sampled"].rows == 24
    found = quality.summary["distinct_2,sampled"]
    assert found.value == distinct([r["tokens"] for r in rows], 2).value
    assert found.low < found.value < found.high


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
