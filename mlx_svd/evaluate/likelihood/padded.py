"""Texts of similar length in one pass, the shorter ones filled up: for every model and device."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_svd.evaluate.likelihood.batches import Batch, make_batches
from mlx_svd.evaluate.likelihood.encode import EncodedItem
from mlx_svd.evaluate.likelihood.passes import Row, of_similar_length
from mlx_svd.evaluate.likelihood.prefix_cache import PrefixCache
from mlx_svd.evaluate.likelihood.split import SplitModel


class PaddedPasses:
    """Passes of one model; mask_axes: see ``prefix_cache``."""

    def __init__(self, split: SplitModel, mask_axes: int):
        self.split, self.mask_axes = split, mask_axes

    def batches(self, items: Sequence[EncodedItem], max_length: int, tokens: int) -> list[Batch]:
        """Every item in exactly one batch of at most so many padded tokens, if it is not longer."""
        return make_batches(items, max_length, tokens)

    def prefix(self, tokens: Sequence[int]) -> list[PrefixCache]:
        """Keys and values of a text that others go on from."""
        caches = self._empty()
        self.split.hidden(mx.array(tokens)[None], caches)
        mx.eval([(cache.keys, cache.values) for cache in caches])
        return caches

    def hidden(
        self, prompts: list[Row], following: list[Row], before: list[PrefixCache]
    ) -> Iterator[tuple[mx.array, list[Row], list[int]]]:
        """(hidden states (N, D), rows, where in N each row begins) of one pass after the other:
        first the prompts, behind ``before`` if there is any, then what follows them."""
        shared = before[0].size() if before else 0
        caches = [PrefixCache(c.keys, c.values, shared, self.mask_axes) for c in before]
        if following and not caches:
            caches = self._empty()
        yield _flat(self.split.hidden(_filled_up(prompts), caches or None), prompts)
        for rows in of_similar_length(following):
            origin = [row.prompt for row in rows]
            lengths = mx.array([shared + len(prompts[i].tokens) for i in origin])
            part = [cache.rows(mx.array(origin), lengths) for cache in caches]
            yield _flat(self.split.hidden(_filled_up(rows), part), rows)

    def _empty(self) -> list[PrefixCache]:
        return [PrefixCache(mask_axes=self.mask_axes) for _ in range(self.split.layers)]


def _filled_up(rows: list[Row]) -> mx.array:
    """(n, longest) int32, filled on the right with token 0, which causal attention never sees."""
    tokens = np.zeros((len(rows), max(len(row.tokens) for row in rows)), dtype=np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = row.tokens
    return mx.array(tokens)


def _flat(hidden: mx.array, rows: list[Row]) -> tuple[mx.array, list[Row], list[int]]:
    starts = [number * hidden.shape[1] for number in range(len(rows))]
    return hidden.reshape(-1, hidden.shape[-1]), rows, starts
