"""Log-likelihoods of continuations: items in batches, every prompt computed once.

One batch takes up to three passes. What the prompts of many items have in common (the examples of
a subject, the introduction of TruthfulQA) is computed once for all; then each prompt, at whose end
the first tokens of all its continuations are read off; then the rest of the continuations, which
look back at the keys and values of their prompt. A prompt with one continuation takes one pass.
Logits are computed at the scored positions only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.batches import BATCH_TOKENS, Batch, make_batches
from mlx_svd.evaluate.likelihood.encode import EncodedItem
from mlx_svd.evaluate.likelihood.forward import LOGIT_BYTES
from mlx_svd.evaluate.likelihood.passes import Row, of_similar_length, passes
from mlx_svd.evaluate.likelihood.prefix_cache import PrefixCache, mask_axes
from mlx_svd.evaluate.likelihood.split import SplitModel
from mlx_svd.evaluate.likelihood.vocabulary import word_log_probs


@dataclass(frozen=True)
class Scores:
    """Of one item, in the order of its pairs. log_likelihoods (C,) float64 in nats; greedy (C,)
    bool: every token of the continuation is the most probable one (None: not asked for)."""

    log_likelihoods: np.ndarray
    greedy: np.ndarray | None


class Scorer:
    """Scores encoded items with one model.

    greedy: also tell whether continuations are what the model would generate. Raises MlxSvdError
    if the model's architecture cannot be evaluated (see :class:`SplitModel`).
    """

    def __init__(self, model: nn.Module, *, greedy: bool = False):
        self.split, self.greedy = SplitModel(model), greedy
        self.mask_axes = mask_axes(self.split)
        self._prefix: tuple[tuple[int, ...], list[PrefixCache]] = ((), [])

    def scores(
        self, items: Sequence[EncodedItem], max_length: int, batch_tokens: int = BATCH_TOKENS
    ) -> list[Scores]:
        """Of every item, in their order."""
        found: dict[int, Scores] = {}
        for batch in make_batches(items, max_length, batch_tokens):
            found |= zip(batch.items, self.score_batch(items, batch), strict=True)
        return [found[i] for i in range(len(items))]

    def score_batch(self, items: Sequence[EncodedItem], batch: Batch) -> list[Scores]:
        """Of the batch's items, in its order. Raises MlxSvdError naming an item whose
        log-likelihood is not finite, or whose token ids the model lacks."""
        chosen = [items[i] for i in batch.items]
        self._check_ids(chosen)
        prompts, following = passes(chosen, batch.shared)
        before = self._shared(chosen[0].pairs[0][0][: batch.shared])
        caches = [PrefixCache(c.keys, c.values, batch.shared, self.mask_axes) for c in before]
        if following and not caches:
            caches = self._empty()
        hidden = self.split.hidden(_padded(prompts), caches or None)
        found = [self._picked(hidden, prompts)]
        for rows in of_similar_length(following):
            origin = [row.prompt for row in rows]
            lengths = mx.array([batch.shared + len(prompts[i].tokens) for i in origin])
            part = [cache.rows(mx.array(origin), lengths) for cache in caches]
            found.append(self._picked(self.split.hidden(_padded(rows), part), rows))
        return self._summed(chosen, found)

    def _empty(self) -> list[PrefixCache]:
        return [PrefixCache(mask_axes=self.mask_axes) for _ in range(self.split.layers)]

    def _shared(self, tokens: tuple[int, ...]) -> list[PrefixCache]:
        """Keys and values of a prefix; those of the last one are kept for the next batch."""
        if not tokens:
            return []
        if self._prefix[0] != tokens:
            caches = self._empty()
            self.split.hidden(mx.array(tokens)[None], caches)
            mx.eval([(cache.keys, cache.values) for cache in caches])
            self._prefix = (tokens, caches)
        return self._prefix[1]

    def _picked(self, hidden: mx.array, rows: list[Row]) -> tuple[np.ndarray, ...]:
        """(owners, log-probabilities, is the most probable) of the tokens that rows want."""
        wanted = [
            (number * hidden.shape[1] + position, token, owner)
            for number, row in enumerate(rows)
            for position, token, owner in row.wanted
        ]
        places, targets, owners = np.array(wanted).T
        unique, inverse = np.unique(places, return_inverse=True)
        flat = hidden.reshape(-1, hidden.shape[-1])
        step = max(1, LOGIT_BYTES // (4 * self.split.vocabulary))
        values = np.zeros(len(targets))
        best = np.ones(len(targets), dtype=bool)
        for start in range(0, len(unique), step):
            logits = self.split.logits(flat[mx.array(unique[start : start + step])])
            chosen = np.flatnonzero((inverse >= start) & (inverse < start + step))
            at, words = inverse[chosen] - start, targets[chosen]
            values[chosen] = word_log_probs(logits, at, words)
            if self.greedy:
                best[chosen] = np.array(mx.argmax(logits, axis=-1))[at] == words
        return owners, values, best

    def _summed(self, items: list[EncodedItem], parts: list[tuple]) -> list[Scores]:
        counts = [len(item.pairs) for item in items]
        sums, greedy = np.zeros(sum(counts)), np.ones(sum(counts), dtype=bool)
        for owners, values, best in parts:
            np.add.at(sums, owners, values)
            np.logical_and.at(greedy, owners, best)
        ends = np.cumsum(counts)
        scores = []
        for item, start, end in zip(items, ends - counts, ends, strict=True):
            if not np.isfinite(sums[start:end]).all():
                raise MlxSvdError(
                    f"{item.name}: a log-likelihood is {sums[start:end].min()}; the model "
                    "overflows or holds NaN, load it in float32 or make the checkpoint again"
                )
            scores.append(
                Scores(sums[start:end].copy(), greedy[start:end].copy() if self.greedy else None)
            )
        return scores

    def _check_ids(self, items: list[EncodedItem]) -> None:
        for item in items:
            largest = max(max(tokens) for pair in item.pairs for tokens in pair)
            if largest >= self.split.vocabulary:
                raise MlxSvdError(
                    f"{item.name}: token id {largest} is beyond the model's vocabulary of "
                    f"{self.split.vocabulary}; tokenizer and model do not belong together"
                )


def _padded(rows: list[Row]) -> mx.array:
    """(n, longest) int32, filled on the right with token 0, which causal attention never sees."""
    tokens = np.zeros((len(rows), max(len(row.tokens) for row in rows)), dtype=np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = row.tokens
    return mx.array(tokens)
