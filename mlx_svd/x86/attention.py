"""Attention of queries that share keys in groups, by numpy, as a differentiable function.

Shapes: B texts, K heads of keys, G queries for each of them, L queries, S positions, D components.
A block of scores is made, normalized and used up while it is in the processor's cache, as in
FlashAttention (Dao et al., 2022); the backward pass makes it again.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_svd.x86.workers import in_parts

# Scores worked on at a time by one thread, and queries of one head among them.
SCORES, QUERIES = 1 << 16, 128


@functools.lru_cache(maxsize=256)
def attention(scale: float, causal: bool) -> Callable[..., mx.array]:
    """(queries (B, K, G, L, D), keys, values (B, K, S, D), bias) -> (B, K, G, L, D), all float32.

    bias: is added to the scores, broadcast to (B, K, G, L, S). causal: the queries are the last L
    of S positions and none looks ahead; bias is then not read. Its gradient is taken to be zero.
    """

    @mx.custom_function
    def attend(queries: mx.array, keys: mx.array, values: mx.array, bias: mx.array) -> mx.array:
        work = _Work.of(queries, keys, values, bias, scale, causal)
        found = np.empty((*queries.shape[:-1], values.shape[-1]), np.float32)
        in_parts(lambda part: work.forward(part, found), work.parts())
        return mx.array(found)

    @attend.vjp
    def _(primals, cotangent, _):
        work = _Work.of(*primals, scale, causal)
        gradients = [np.zeros(array.shape, np.float32) for array in primals[:3]]
        given = np.asarray(cotangent)
        in_parts(lambda part: work.backward(part, given, *gradients), work.parts())
        return *(mx.array(gradient) for gradient in gradients), mx.zeros_like(primals[3])

    return attend


@dataclass(frozen=True)
class _Work:
    """The arrays of one call. A part is (slice of texts, slice of key heads)."""

    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    bias: np.ndarray
    scale: np.float32
    causal: bool

    @classmethod
    def of(cls, queries, keys, values, bias, scale: float, causal: bool) -> "_Work":
        q, k, v, added = (np.asarray(array) for array in (queries, keys, values, bias))
        added = np.broadcast_to(added, (*q.shape[:4], k.shape[2]))
        return cls(q, k, v, added, np.float32(scale), causal)

    def parts(self) -> list[tuple[slice, slice]]:
        """Texts and heads whose scores are worked on together."""
        texts, heads, group, length = self.queries.shape[:4]
        one = group * min(length, QUERIES) * self.keys.shape[2]
        h = min(heads, max(1, SCORES // one))
        t = max(1, SCORES // (one * heads))
        return [
            (slice(i, i + t), slice(j, j + h))
            for i in range(0, texts, t)
            for j in range(0, heads, h)
        ]

    def forward(self, part: tuple[slice, slice], found: np.ndarray) -> None:
        """Write the part's outputs."""
        keys, values = self.keys[part], self.values[part]
        for block, seen, queries in self._blocks(part):
            weights = self._weights(part, block, queries, keys[:, :, :seen])
            out = found[part][:, :, :, block]
            out[...] = (weights @ values[:, :, :seen]).reshape(out.shape)

    def backward(
        self,
        part: tuple[slice, slice],
        cotangent: np.ndarray,
        d_queries: np.ndarray,
        d_keys: np.ndarray,
        d_values: np.ndarray,
    ) -> None:
        """Write or add up the part's gradients."""
        for block, seen, queries in self._blocks(part):
            keys, values = self.keys[part][:, :, :seen], self.values[part][:, :, :seen]
            weights = self._weights(part, block, queries, keys)
            given = cotangent[part][:, :, :, block]
            given = given.reshape(*weights.shape[:3], -1)
            d_values[part][:, :, :seen] += weights.swapaxes(-1, -2) @ given
            slope = given @ values.swapaxes(-1, -2)
            slope *= weights
            weights *= slope.sum(axis=-1, keepdims=True)
            slope -= weights
            out = d_queries[part][:, :, :, block]
            out[...] = (slope @ keys).reshape(out.shape)
            out *= self.scale
            # The queries are scaled already.
            d_keys[part][:, :, :seen] += slope.swapaxes(-1, -2) @ queries

    def _blocks(self, part: tuple[slice, slice]) -> Iterator[tuple[slice, int, np.ndarray]]:
        """(queries of a block, positions that they see, scaled queries (b, k, G * l, D))."""
        length, positions = self.queries.shape[3], self.keys.shape[2]
        for start in range(0, length, QUERIES):
            block = slice(start, min(start + QUERIES, length))
            seen = positions - length + block.stop if self.causal else positions
            queries = self.queries[part][:, :, :, block] * self.scale
            yield block, seen, queries.reshape(*queries.shape[:2], -1, queries.shape[-1])

    def _weights(
        self, part: tuple[slice, slice], block: slice, queries: np.ndarray, keys: np.ndarray
    ) -> np.ndarray:
        """Softmax over the keys, (b, k, G * l, seen)."""
        scores = queries @ keys.swapaxes(-1, -2)
        rows = block.stop - block.start
        grouped = scores.reshape(*scores.shape[:2], -1, rows, scores.shape[-1])
        if self.causal:
            # Only among the block's own positions is anything ahead.
            grouped[..., -rows:] += _ahead(rows)
        else:
            grouped += self.bias[part][:, :, :, block]
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        return scores


@functools.lru_cache(maxsize=QUERIES)
def _ahead(rows: int) -> np.ndarray:
    """(rows, rows): minus infinity above the diagonal."""
    return np.triu(np.full((rows, rows), -np.inf, np.float32), 1)
