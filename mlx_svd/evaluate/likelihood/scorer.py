"""Log-likelihoods of continuations: items in batches, every prompt computed once.

What the prompts of many items have in common (the examples of a subject, the introduction of
TruthfulQA) is computed once for all; then each prompt, at whose end the first tokens of all its
continuations are read off; and the rest of the continuations, which look back at the keys and
values of their prompt. Logits are computed at the scored positions only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.batches import BATCH_TOKENS, Batch
from mlx_svd.evaluate.likelihood.encode import EncodedItem
from mlx_svd.evaluate.likelihood.forward import LOGIT_BYTES
from mlx_svd.evaluate.likelihood.packed import PackedPasses, packs
from mlx_svd.evaluate.likelihood.padded import PaddedPasses
from mlx_svd.evaluate.likelihood.passes import Row, passes
from mlx_svd.evaluate.likelihood.prefix_cache import mask_axes
from mlx_svd.evaluate.likelihood.split import SplitModel
from mlx_svd.evaluate.likelihood.vocabulary import word_log_probs

# (owners, log-probabilities, is it the most probable one) of the tokens that rows want
Picked = tuple[np.ndarray, np.ndarray, np.ndarray]


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
        if packs(self.split):
            self.passes = PackedPasses(self.split)
        else:
            self.passes = PaddedPasses(self.split, self.mask_axes)
        self._prefix: tuple[tuple[int, ...], list[Any]] = ((), [])

    def batches(
        self, items: Sequence[EncodedItem], max_length: int, batch_tokens: int = BATCH_TOKENS
    ) -> list[Batch]:
        """Which items are scored together: every one in exactly one batch."""
        return self.passes.batches(items, max_length, batch_tokens)

    def scores(
        self, items: Sequence[EncodedItem], max_length: int, batch_tokens: int = BATCH_TOKENS
    ) -> list[Scores]:
        """Of every item, in their order."""
        found: dict[int, Scores] = {}
        for batch in self.batches(items, max_length, batch_tokens):
            found |= zip(batch.items, self.score_batch(items, batch), strict=True)
        return [found[i] for i in range(len(items))]

    def score_batch(self, items: Sequence[EncodedItem], batch: Batch) -> list[Scores]:
        """Of the batch's items, in its order. Raises MlxSvdError naming an item whose
        log-likelihood is not finite, or whose token ids the model lacks."""
        chosen = [items[i] for i in batch.items]
        self._check_ids(chosen)
        before = self._shared(chosen[0].pairs[0][0][: batch.shared])
        rows = passes(chosen, batch.shared)
        found = [self._picked(*each) for each in self.passes.hidden(*rows, before)]
        return self._summed(chosen, found)

    def _shared(self, tokens: tuple[int, ...]) -> list[Any]:
        """Keys and values of a prefix; those of the last one are kept for the next batch."""
        if not tokens:
            return []
        if self._prefix[0] != tokens:
            self._prefix = (tokens, self.passes.prefix(tokens))
        return self._prefix[1]

    def _picked(self, hidden: mx.array, rows: list[Row], starts: list[int]) -> Picked:
        """Of hidden states (N, D), of which each row's begin at its start."""
        wanted = [
            (start + position, token, owner)
            for start, row in zip(starts, rows, strict=True)
            for position, token, owner in row.wanted
        ]
        places, targets, owners = np.array(wanted).T
        unique, inverse = np.unique(places, return_inverse=True)
        step = max(1, LOGIT_BYTES // (4 * self.split.vocabulary))
        values = np.zeros(len(targets))
        best = np.ones(len(targets), dtype=bool)
        for start in range(0, len(unique), step):
            logits = self.split.logits(hidden[mx.array(unique[start : start + step])])
            chosen = np.flatnonzero((inverse >= start) & (inverse < start + step))
            at, words = inverse[chosen] - start, targets[chosen]
            values[chosen] = word_log_probs(logits, at, words)
            if self.greedy:
                best[chosen] = np.array(mx.argmax(logits, axis=-1))[at] == words
        return owners, values, best

    def _summed(self, items: list[EncodedItem], parts: list[Picked]) -> list[Scores]:
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
