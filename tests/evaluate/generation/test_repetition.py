"""Repetition against counting by brute force, and loops on texts made for it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.generation.repetition import distinct, loops, repetition

TEXT = st.lists(st.integers(0, 4), max_size=40)


def ngrams(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def different(grams):
    seen = []
    for gram in grams:
        if gram not in seen:
            seen.append(gram)
    return len(seen)


@given(TEXT, st.integers(1, 4))
def test_repetition_is_that_counted_by_brute_force(tokens, n):
    grams = ngrams(tokens, n)
    expected = 1 - different(grams) / len(grams) if grams else None
    assert repetition(tokens, n) == (pytest.approx(expected) if grams else None)


def test_repetition_of_known_texts():
    assert repetition([1, 2, 3, 4, 5], 2) == 0
    assert repetition([1, 2, 1, 2, 1, 2], 2) == pytest.approx(1 - 2 / 5)
    assert repetition([7] * 11, 3) == pytest.approx(1 - 1 / 9)
    assert repetition([1], 2) is None


@given(st.lists(TEXT, min_size=1, max_size=6), st.integers(1, 3))
def test_distinct_counts_all_texts_together_and_no_ngram_across_two_texts(texts, n):
    grams = [g for text in texts for g in ngrams(text, n)]
    if grams:
        assert distinct(texts, n).value == pytest.approx(different(grams) / len(grams))


def test_distinct_sees_that_every_text_is_the_same_which_repetition_cannot():
    texts = [[1, 2, 3, 4]] * 10
    assert [repetition(text, 1) for text in texts] == [0] * 10
    assert distinct(texts, 1).value == pytest.approx(0.1)


@pytest.mark.parametrize("items", [None, ["a", "b", "a", "c", "b", "c"]])
def test_pseudo_values_come_from_leaving_out_each_item(items):
    texts = [[1, 2, 3], [1, 2], [4, 4, 4, 4], [5, 1, 2], [1, 2, 3], [6]]
    names = list(range(6)) if items is None else items
    found = distinct(texts, 1, items)
    size = len(set(names))
    assert len(found.parts) == size
    for part, name in zip(found.parts, sorted(set(names)), strict=True):
        rest = distinct([t for t, x in zip(texts, names, strict=True) if x != name], 1).value
        assert part == pytest.approx(size * found.value - (size - 1) * rest)


def test_jackknife_error_is_the_variation_between_samples_of_texts_or_a_little_more():
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, 501)
    shares /= shares.sum()

    def draw():
        return distinct([rng.choice(500, 30, p=shares).tolist() for _ in range(40)], 1)

    found = [draw() for _ in range(200)]
    error = np.mean([np.std(d.parts, ddof=1) / math.sqrt(40) for d in found])
    assert 0.95 < error / np.std([d.value for d in found], ddof=1) < 1.4


def test_texts_without_ngrams_are_refused():
    with pytest.raises(MlxSvdError, match="none of 2 texts has 3 tokens"):
        distinct([[1, 2], []], 3)


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [
        ([9, 8, 1, 2, 1, 2, 1, 2], True),
        ([9, 8, 1, 2, 3, 1, 2, 3, 1, 2, 3], True),
        ([1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2], True),  # stopped within the phrase
        ([4, 7, 7, 7, 7, 7, 7], True),
        ([4, 7, 7, 7, 7, 7], False),  # five times one token
        ([1, 2, 3, 1, 2, 3], False),  # twice
        ([1, 2, 1, 2, 1, 2, 9], False),  # got out of it
        ([1, 2, 3, 1, 2, 4, 1, 2, 5], False),  # a counter
        ([], False),
        (list(range(50)), False),
        (list(range(30)) * 3, True),
    ],
)
def test_loops_are_a_phrase_three_times_at_the_end(tokens, looping):
    assert loops(tokens) is looping


@given(TEXT)
def test_loops_are_those_found_by_brute_force(tokens):
    n = len(tokens)
    expected = any(
        tokens[n - 3 * p : n - 2 * p] == tokens[n - 2 * p : n - p] == tokens[n - p :]
        for p in range(2, n // 3 + 1)
    )
    assert loops(tokens) is expected


@given(TEXT, st.lists(st.integers(0, 4), min_size=2, max_size=6), st.integers(3, 5))
def test_whatever_came_before_a_phrase_three_times_is_a_loop(before, phrase, times):
    assert loops(before + phrase * times)
