"""Perplexities are those of a plain loop; what was not given is not measured, and said so."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.protection.quality import (
    QualityMaterial,
    measure_quality,
    quality_summary,
)

MESSAGES = [
    {"role": "user", "content": "an oak?"},
    {"role": "assistant", "content": "a fir."},
    {"role": "user", "content": "an elm?"},
    {"role": "assistant", "content": "no, a yew."},
]


def losses(model, tokens, first):
    """Negative log-likelihoods of tokens[first:] in nats."""
    logits = np.array(model(mx.array([tokens[:-1]]))[0], dtype=np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [-log_probs[i - 1, tokens[i]] for i in range(first, len(tokens))]


def measure(baseline, held_out, conversations=None):
    material = QualityMaterial(held_out, [], 4, conversations)
    model = baseline.open("float32")
    return model, measure_quality(model, baseline.tokenizer, baseline.config, material)


def test_perplexities_are_those_of_a_plain_loop(baseline, tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}))
    windows = baseline.data.training[:3]
    model, quality = measure(baseline, windows, path)
    summary = quality_summary(quality, quality)
    plain = [loss for window in windows for loss in losses(model, window.tolist(), 1)]
    assert summary["perplexity"]["perplexity"] == pytest.approx(math.exp(np.mean(plain)), rel=1e-4)
    assert summary["perplexity_ratio"]["ratio"] == 1
    encode, said = baseline.tokenizer.encode, []
    for context, reply in (
        ("User: an oak?\nAssistant:", " a fir."),
        ("User: an oak?\nAssistant: a fir.\nUser: an elm?\nAssistant:", " no, a yew."),
    ):
        said += losses(model, encode(context + reply), len(encode(context)))
    found = summary["conversation_perplexity"]
    assert found["value"] == pytest.approx(math.exp(np.mean(said)), rel=1e-4)
    assert found["n"] == 1


def test_what_was_not_given_is_not_measured(baseline):
    summary = quality_summary(measure(baseline, baseline.data.held_out)[1])
    assert set(summary["conversation_perplexity"]) == {"not_measured"}
    assert set(summary["generation"]) == {"not_measured"}


def test_a_row_that_is_no_conversation_is_named(baseline, tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": []}))
    with pytest.raises(MlxSvdError, match=r"talk.jsonl: line 1 has no list of messages"):
        measure(baseline, baseline.data.held_out, path)
