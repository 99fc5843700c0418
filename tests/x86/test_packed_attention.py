"""Attention among packed texts, against a softmax over every text by itself in float64."""

import numpy as np
import pytest

from mlx_svd.x86.packed_attention import Group, Prefix, packed_attention

HEADS, KEY_HEADS, SIZE = 4, 2, 16


def normal(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one_text(queries, keys, values, scale, window):
    """Queries (L, H, D) are the last of S keys, values (S, K, D); float64."""
    length, positions = len(queries), len(keys)
    at = np.arange(positions - length, positions)[:, None] - np.arange(positions)
    seen = (at >= 0) & (at < (window or positions))
    found = np.empty((length, HEADS, values.shape[-1]))
    for head in range(HEADS):
        k, v = (x[:, head * KEY_HEADS // HEADS].astype(float) for x in (keys, values))
        scores = np.where(seen, queries[:, head].astype(float) @ k.T * scale, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        found[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v
    return found


def expected(queries, keys, values, groups, scale, prefix, window):
    found = np.empty((*queries.shape[:2], values.shape[-1]))
    for group in groups:
        first = np.arange(group.start, group.start + group.lengths[0])
        begin = group.start
        for number, length in enumerate(group.lengths):
            own = np.arange(begin, begin + length)
            before = first if number else first[:0]
            seen = np.concatenate([before, own])
            k, v = keys[seen], values[seen]
            if prefix:
                k, v = np.concatenate([prefix.keys, k]), np.concatenate([prefix.values, v])
            found[own] = one_text(queries[own], k, v, scale, window)
            begin += length
    return found


@pytest.mark.parametrize("window", [None, 1, 7, 200])
@pytest.mark.parametrize("before", [0, 1, 37])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1,)],
        [(5, 2, 3), (1,), (4, 1)],
        [(130, 1, 140), (3,), (300,)],  # more than one block of queries
        [(2, 90, 90), (126, 5)],  # a block that begins in the first text and ends in others
        [(1030, 3)],  # what is hidden is not kept
    ],
)
def test_packed_texts_are_attended_to_as_one_by_one(lengths, before, window):
    groups, rows = [], 0
    for each in lengths:
        groups.append(Group(rows, each))
        rows += sum(each)
    queries = normal(rows, HEADS, SIZE, seed=0)
    keys, values = normal(rows, KEY_HEADS, SIZE, seed=1), normal(rows, KEY_HEADS, 8, seed=2)
    prefix = None
    if before:
        prefix = Prefix(
            normal(before, KEY_HEADS, SIZE, seed=3), normal(before, KEY_HEADS, 8, seed=4)
        )
    for _ in range(2):  # the second time with what groups have kept
        found = packed_attention(
            queries, keys, values, groups, scale=0.3, prefix=prefix, window=window
        )
    wanted = expected(queries, keys, values, groups, 0.3, prefix, window)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_strided_heads_as_a_model_gives_them_change_nothing():
    """Keys and values are often parts of one projection."""
    both = normal(50, KEY_HEADS, 2 * SIZE, seed=0)
    keys, values = both[..., :SIZE], both[..., SIZE:]
    queries = normal(HEADS, 50, SIZE, seed=1).swapaxes(0, 1)
    groups = [Group(0, (30, 20))]
    found = packed_attention(queries, keys, values, groups, scale=0.5)
    same = packed_attention(
        *(np.ascontiguousarray(x) for x in (queries, keys, values)), groups, scale=0.5
    )
    np.testing.assert_allclose(found, same, atol=1e-6)


def test_nan_stays_in_its_group():
    queries, keys = normal(12, HEADS, SIZE, seed=0), normal(12, KEY_HEADS, SIZE, seed=1)
    values = normal(12, KEY_HEADS, SIZE, seed=2)
    values[3] = np.nan
    found = packed_attention(queries, keys, values, [Group(0, (6,)), Group(6, (6,))], scale=1.0)
    assert np.isnan(found[3:6]).all()
    assert np.isfinite(found[6:]).all()
