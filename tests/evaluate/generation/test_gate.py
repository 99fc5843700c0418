"""The gate on loops: what it passes, fails, and cannot tell."""

import mlx.nn as nn
import pytest

from mlx_svd.checkpoint.loader import load
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.generation.gate import generation_gate
from mlx_svd.evaluate.generation.prompts import read_prompts
from mlx_svd.evaluate.generation.quality import (
    GenerationSettings,
    generation_quality,
)
from mlx_svd.evaluate.perplexity import perplexity
from tests.evaluate.result_folders import text_record, texts


@pytest.fixture(scope="module")
def demo():
    return load(DEMO_MODEL, dtype="float32")


def test_gate_passes_equal_texts_and_fails_texts_that_loop():
    assert generation_gate(texts(20), texts(20)).verdict == "pass"
    gate = generation_gate(texts(20), texts(60))
    assert gate.verdict == "fail"
    assert gate.lines[0].startswith("fail: loop, greedy: 0.100 -> 0.300, difference +0.200 [")


def test_gate_fails_for_one_way_of_generating_alone():
    base = texts(150) + texts(2, kind="sampled")
    model = texts(150) + texts(40, kind="sampled")
    gate = generation_gate(base, model)
    assert {c.name: c.verdict for c in gate.checks} == {
        "loop,greedy": "pass", "loop,sampled": "fail",
    }  # fmt: skip
    assert gate.verdict == "fail"


def test_gate_on_few_prompts_is_undecided_and_says_how_few():
    gate = generation_gate(texts(2, n=20), texts(3, n=20))
    assert gate.verdict == "undecided"
    assert "20 prompts are too few" in gate.lines[0]


def test_gate_margin_and_metrics_can_be_chosen():
    assert generation_gate(texts(20), texts(60), margin=0.3).verdict == "pass"
    checks = generation_gate(texts(20), texts(60), metrics=("loop", "rep_2")).checks
    assert [c.name for c in checks] == ["rep_2,greedy", "loop,greedy"]


class LoopsWhenItReadsItself(nn.Module):
    """The demo model; but one token at a time, as in generation, it is far too sure of itself."""

    def __init__(self, model):
        super().__init__()
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"margin": -0.1}, "gate margin"),
        ({"metrics": ["length"]}, "--gate-metrics"),
        ({"records": texts(2, n=19)}, "1 only in A"),
    ],
)
def test_what_cannot_be_gated_is_refused(change, words):
    call = {"records": texts(2, n=20), **change}
    with pytest.raises(MlxSvdError, match=words):
        generation_gate(texts(2, n=20), **call)


def test_texts_too_short_for_every_gate_metric_are_refused():
    short = [text_record(i, [1]) for i in range(5)]
    with pytest.raises(MlxSvdError, match="no text is long enough for rep_2"):
        generation_gate(short, short, metrics=["rep_2"])
