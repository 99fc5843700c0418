"""Log-likelihoods in batches, against one sequence at a time in float64."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_svd.checkpoint.loader import load, load_model
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood import scorer as scorer_module
from mlx_svd.evaluate.likelihood import vocabulary
from mlx_svd.evaluate.likelihood.batches import make_batches
from mlx_svd.evaluate.likelihood.encode import EncodedItem
from mlx_svd.evaluate.likelihood.packed import PackedPasses
from mlx_svd.evaluate.likelihood.padded import PaddedPasses
from mlx_svd.evaluate.likelihood.scorer import Scorer
from mlx_svd.evaluate.likelihood.split import SplitModel
from mlx_svd.x86 import slow_exponentials
from tests.evaluate.reference import log_probs
from tests.tiny import FAMILIES, VOCAB, write_tiny

MAX_LENGTH = 128
COMPUTE_OWN_ATTENTION = {"gemma2", "gpt_neo"}


def random_items(count=16, vocabulary_size=VOCAB, seed=0):
    """Every shape: one and several continuations, of one and more tokens, contexts of an item
    that differ, a prefix that several items share and that is longer than a sliding window."""
    rng = np.random.default_rng(seed)

    def tokens(low, high):
        return tuple(rng.integers(0, vocabulary_size, rng.integers(low, high)).tolist())

    prefix, items = tokens(40, 41), []
    for number in range(count):
        context = tokens(1, 50)
        if number % 3 == 0:
            context = prefix + context[:20]
        choices = 1 if number % 4 == 3 else 4
        pairs = [(context, tokens(1, 2 if number % 7 == 0 else 9)) for _ in range(choices)]
        if number % 5 == 2:
            pairs = [(before + (k,), after) for k, (before, after) in enumerate(pairs)]
        items.append(EncodedItem(f"item {number}", tuple(pairs), 0))
    return items


def assert_as_one_by_one(model, items, scores, limit=1e-4):
    for item, found in zip(items, scores, strict=True):
        for (context, following), value, greedy in zip(
            item.pairs, found.log_likelihoods, found.greedy, strict=True
        ):
            expected = log_probs(model, context + following)[len(context) - 1 :]
            words = np.array(following)
            assert value == pytest.approx(expected[np.arange(len(words)), words].sum(), abs=limit)
            assert greedy == (expected.argmax(axis=1) == words).all()


@pytest.mark.parametrize(
    ("family", "packed"),
    [(f, p) for f in FAMILIES for p in (True, False) if not p or f not in COMPUTE_OWN_ATTENTION],
)
def test_every_family_is_scored_as_one_sequence_at_a_time(family, packed, tmp_path, monkeypatch):
    if packed and not slow_exponentials():
        pytest.skip("nothing is packed here: MLX computes attention on this processor")
    if not packed:
        monkeypatch.setattr(scorer_module, "packs", lambda split: False)
    model, _ = load_model(write_tiny(family, tmp_path / "model"), dtype="float32")
    items = random_items()
    scorer = Scorer(model, greedy=True)
    assert isinstance(scorer.passes, PackedPasses if packed else PaddedPasses)
    assert any(batch.shared for batch in scorer.batches(items, MAX_LENGTH))
    for tokens in (1, 300, 4096):
        assert_as_one_by_one(model, items, scorer.scores(items, MAX_LENGTH, tokens))


@pytest.mark.parametrize("family", sorted(COMPUTE_OWN_ATTENTION))
def test_a_model_that_computes_its_own_attention_is_not_packed(family, tmp_path):
    model, _ = load_model(write_tiny(family, tmp_path / "model"), dtype="float32")
    assert isinstance(Scorer(model).passes, PaddedPasses)


def test_half_precision_is_not_packed():
    model, _ = load(DEMO_MODEL, dtype="bfloat16")
    assert isinstance(Scorer(model).passes, PaddedPasses)


def test_logits_in_several_parts_are_those_in_one(monkeypatch):
    model, _ = load(DEMO_MODEL, dtype="float32")
    items = random_items()
    whole = Scorer(model).scores(items, MAX_LENGTH)
    monkeypatch.setattr(scorer_module, "LOGIT_BYTES", 4 * 8192 * 7)
    parts = Scorer(model).scores(items, MAX_LENGTH)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a.log_likelihoods, b.log_likelihoods, atol=1e-4)


def test_numpy_and_mlx_normalize_alike(monkeypatch):
    logits = mx.random.normal((40, 300), key=mx.random.key(0)) * 8
    rows, words = np.array([0, 3, 3, 39]), np.array([5, 0, 299, 7])
    found = vocabulary.word_log_probs(logits, rows, words)
    monkeypatch.setattr(vocabulary, "on_cpu", lambda: False)
    np.testing.assert_allclose(found, vocabulary.word_log_probs(logits, rows, words), atol=1e-4)


def test_batches_hold_every_item_once_and_respect_the_tokens():
    items = random_items(60)
    for tokens in (1, 200, 1000):
        batches = make_batches(items, MAX_LENGTH, tokens)
        assert sorted(i for batch in batches for i in batch.items) == list(range(60))
        for batch in batches:
            widest = max(len(c) for i in batch.items for c, _ in items[i].pairs) - batch.shared
            assert len(batch.items) == 1 or widest * len(batch.items) <= tokens
    assert [len(b.items) for b in make_batches(items, MAX_LENGTH, 1)] == [1] * 60


def test_padding_never_reaches_past_the_last_position():
    """Learned positions end there, and MLX would read other memory behind them."""
    long = EncodedItem("long", (((1,) * 120, (2, 3)), ((1,) * 120, (4, 5))), 0)
    wide = EncodedItem("wide", (((1,) * 20, (2,) * 40), ((1,) * 20, (3,) * 40)), 0)
    batches = make_batches([long, wide], MAX_LENGTH, 4096)
    assert len(batches) == 2


def test_one_nan_stops_the_run_and_names_the_item():
    model, _ = load(DEMO_MODEL, dtype="float32")
    items = random_items(6)
    weight = model.model.embed_tokens.weight
    poisoned = np.array(weight)
    culprit = items[4].pairs[0][0][0]
    poisoned[culprit] = np.nan
    # Untied, so that only texts with this token are affected.
    model.args.tie_word_embeddings = False
    model.lm_head = nn.Linear(*weight.shape[::-1], bias=False)
    model.lm_head.weight = weight
    model.model.embed_tokens.weight = mx.array(poisoned)
    with pytest.raises(MlxSvdError, match=r"a log-likelihood is nan.*float32") as error:
        Scorer(model).scores(items, MAX_LENGTH)
    named = next(item for item in items if str(error.value).startswith(f"{item.name}:"))
    assert any(culprit in before + after[:-1] for before, after in named.pairs)


def test_a_token_that_the_model_lacks_names_its_item():
    model, _ = load(DEMO_MODEL, dtype="float32")
    with pytest.raises(MlxSvdError, match=r"item x: token id 9999.*vocabulary of 8192"):
        Scorer(model).scores([EncodedItem("item x", (((1,), (9999,)),), 0)], MAX_LENGTH)


class Unusual(nn.Module):
    """A model whose logits depend on more than the input of its projection."""

    model_type = "unusual"

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.head = nn.Linear(8, 32, bias=False)
        self.layers = [nn.Linear(8, 8)]

    def __call__(self, tokens, cache=None):
        return self.head(self.embed(tokens)) + mx.sin(tokens[..., None] + mx.arange(32))


def test_a_model_whose_logits_cannot_be_split_off_is_refused():
    with pytest.raises(MlxSvdError, match=r"unusual.*differ from the model's own"):
        SplitModel(Unusual())


def test_the_model_is_left_as_it_was():
    model, _ = load(DEMO_MODEL, dtype="float32")
    kinds = [type(module) for module in model.modules()]
    tokens = mx.arange(6)[None]
    before = np.array(model(tokens))
    Scorer(model).scores(random_items(3), MAX_LENGTH)
    assert [type(module) for module in model.modules()] == kinds
    assert np.array_equal(np.array(model(tokens)), before)
