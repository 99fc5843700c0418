"""Margins and texts are those of a plain loop over whole sequences."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.retention import Prober
from tests.evaluate.retention.conftest import PROBES


def log_likelihood(model, tokenizer, prompt, answer):
    """Float64 log-softmax of one whole sequence."""
    context, whole = tokenizer.encode(prompt), tokenizer.encode(f"{prompt} {answer}")
    logits = np.array(model(mx.array([whole[:-1]]))[0], dtype=np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(log_probs[i - 1, whole[i]] for i in range(len(context), len(whole)))


def greedy(model, tokenizer, prompt, count):
    tokens = tokenizer.encode(prompt)
    for _ in range(count):
        best = int(mx.argmax(model(mx.array([tokens]))[0, -1]).item())
        if best in tokenizer.eos_token_ids:
            break
        tokens.append(best)
    return tokenizer.decode(tokens[len(tokenizer.encode(prompt)) :])


def test_margins_are_those_of_a_plain_loop(tiny):
    model, tokenizer = tiny
    found = Prober(tokenizer, PROBES).ask(model)
    for i, probe in enumerate(PROBES):
        scores = [log_likelihood(*tiny, probe.fact.prompt, c) for c in probe.fact.candidates]
        assert found.facts.margins[i] == pytest.approx(scores[0] - max(scores[1:]), abs=1e-4)
        assert found.facts.conflicts[i] == pytest.approx(scores[1] - scores[0], abs=1e-4)
    assert found.paraphrases.owners.tolist() == [0, 0]
    fact = PROBES[0].fact
    for row, prompt in enumerate(PROBES[0].paraphrases):
        scores = [log_likelihood(*tiny, prompt, c) for c in fact.candidates]
        assert found.paraphrases.margins[row] == pytest.approx(
            scores[0] - max(scores[1:]), abs=1e-4
        )
    near = PROBES[0].locality[0]
    scores = [log_likelihood(*tiny, near.prompt, c) for c in (near.object, fact.conflict)]
    assert found.locality.margins[0] == pytest.approx(scores[0] - scores[1], abs=1e-4)
    assert found.texts is None


def test_texts_are_greedy_and_searched_for_whole_words(tiny):
    model, tokenizer = tiny
    found = Prober(tokenizer, PROBES, tokens=5).ask(model, write=True)
    for probe, text in zip(PROBES, found.texts, strict=True):
        assert text == greedy(model, tokenizer, probe.fact.prompt, 5)
    assert found.writes_object.shape == (len(PROBES),)


def test_a_choice_of_probes_gives_their_outcomes(tiny):
    model, tokenizer = tiny
    chosen = np.array([0, 3, 12])
    part = Prober(tokenizer, PROBES).ask(model, write=True).of(chosen)
    alone = Prober(tokenizer, [PROBES[i] for i in chosen]).ask(model, write=True)
    for kind in ("facts", "paraphrases", "locality"):
        np.testing.assert_allclose(
            getattr(part, kind).margins, getattr(alone, kind).margins, atol=1e-4
        )
        np.testing.assert_array_equal(getattr(part, kind).owners, getattr(alone, kind).owners)
    assert part.texts == alone.texts


def test_no_probes_are_refused(tiny):
    with pytest.raises(MlxSvdError, match="no facts"):
        Prober(tiny[1], [])
