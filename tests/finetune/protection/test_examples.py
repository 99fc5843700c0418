"""Batches train the tokens that mlx-lm trains, and padding only where it is asked for."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.trainer import default_loss

from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.protection.examples import Batches, Example, data_examples, fact_examples
from mlx_svd.finetune.protection.trainer import masked_loss
from tests.evaluate.retention.conftest import PROBES

EXAMPLES = [Example(tuple(range(1, 4 + n)), 2) for n in range(5)]
OPTIONS = {"stream": 2, "pad_token": 0, "longest": 64}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(16, 16)

    def __call__(self, tokens):
        return self.table(tokens)


@pytest.mark.parametrize("answers_only", [False, True])
def test_the_loss_is_mlx_lms(answers_only):
    mx.random.seed(0)
    model = Model()
    tokens, mask = Batches(EXAMPLES, 5, 0, answers_only=answers_only, **OPTIONS).batch(0)
    lengths = [len(e.tokens) for row in tokens for e in EXAMPLES if sum(row > 0) == len(e.tokens)]
    # mlx-lm counts tokens predicted from 1 on.
    pairs = mx.array([(2 if answers_only else 0, length - 1) for length in lengths])
    expected, count = default_loss(model, mx.array(tokens), pairs)
    assert int(mask.sum()) == count.item()
    found = masked_loss(model, mx.array(tokens), mx.array(mask))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_unmasked_padding_is_trained_up_to_its_length():
    tokens, mask = Batches(EXAMPLES, 2, 0, mask_padding=False, pad_to=12, **OPTIONS).batch(1)
    assert tokens.shape == (2, 12)
    assert mask.sum() == 2 * 11
    masked = Batches(EXAMPLES, 2, 0, pad_to=12, **OPTIONS).batch(1)[1]
    assert masked.sum() == sum((row > 0).sum() - 1 for row in tokens)


def test_an_epoch_has_every_example_once_in_an_order_of_the_seed():
    batches = Batches(EXAMPLES, 2, 7, **OPTIONS)
    rows = [tuple(t for t in row if t) for step in range(5) for row in batches.batch(step)[0]]
    wanted = sorted(e.tokens for e in EXAMPLES)
    assert sorted(rows[:5]) == sorted(rows[5:]) == wanted
    assert rows[:5] != rows[5:]
    again = Batches(EXAMPLES, 2, 7, **OPTIONS)
    np.testing.assert_array_equal(batches.batch(3)[0], again.batch(3)[0])


def test_facts_are_trained_in_the_tokens_in_which_they_are_asked(baseline):
    fact = PROBES[3].fact
    (example,) = fact_examples(baseline.tokenizer, [fact], "conflict")
    whole = baseline.tokenizer.encode(f"{fact.prompt} {fact.conflict}")
    assert list(example.tokens) == whole
    assert example.offset == len(baseline.tokenizer.encode(fact.prompt))


def test_rows_of_mlx_lm_are_read_and_others_refused(baseline, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "an oak"}) + "\n" + json.dumps({"text": "a fir"}))
    first, _ = data_examples(baseline.tokenizer, path, False)
    assert baseline.tokenizer.decode(list(first.tokens)).startswith("anoak")
    assert first.tokens[-1] == baseline.tokenizer.eos_token_id
    path.write_text(json.dumps({"words": "an oak"}))
    with pytest.raises(MlxSvdError, match=r"rows.jsonl: mlx-lm cannot read it"):
        data_examples(baseline.tokenizer, path, False)


def test_an_example_without_a_trained_token_is_refused():
    with pytest.raises(MlxSvdError, match="training example 0 has no token to predict"):
        Batches([Example((1, 2, 3), 3)], 1, 0, answers_only=True, **OPTIONS)
    with pytest.raises(MlxSvdError, match="nothing to train on"):
        Batches([], 1, 0, **OPTIONS)
