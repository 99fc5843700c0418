"""Perplexity of a text in windows of equal length, and its ratio between two models."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import mlx.nn as nn
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.forward import next_token_logits
from mlx_svd.evaluate.statistics.intervals import window_estimate
from mlx_svd.x86 import cross_entropy


@dataclass(frozen=True)
class WindowLosses:
    """sums (N,) float64: negative log-likelihood of each window in nats; counts (N,) int64: how
    many of its tokens were scored (all but the first)."""

    sums: np.ndarray
    counts: np.ndarray

    def __add__(self, others: "WindowLosses") -> "WindowLosses":
        """These windows and then the others."""
        return WindowLosses(
            np.concatenate([self.sums, others.sums]), np.concatenate([self.counts, others.counts])
        )


@dataclass(frozen=True)
class Perplexity:
    """perplexity = exp(mean negative log-likelihood of a token); low, high: 95 % interval from
    the variation between windows (0 and infinity for one window); tokens: how many were scored."""

    perplexity: float
    low: float
    high: float
    tokens: int


@dataclass(frozen=True)
class PerplexityRatio:
    """ratio: perplexity of a model over that of the base model on the same windows; low, high:
    95 % interval, paired by window; windows: how many."""

    ratio: float
    low: float
    high: float
    windows: int


def window_losses(model: nn.Module, windows: np.ndarray) -> WindowLosses:
    """Score windows (N, L) of token ids; within each, every token but the first.

    Raises MlxSvdError if a loss is not finite, or for ids beyond the vocabulary.
    """
    windows = np.asarray(windows)
    sums = np.zeros(len(windows))
    for rows, logits, targets in next_token_logits(model, windows):
        losses = cross_entropy(logits, targets).sum(axis=-1)
        sums[rows] = np.array(losses, dtype=np.float64)
    if not np.isfinite(sums).all():
        worst = int(np.argmin(np.isfinite(sums)))
        raise MlxSvdError(
            f"window {worst}: the loss is {sums[worst]}; the model overflows or holds NaN, load it "
            "in float32 or make the checkpoint again"
        )
    return WindowLosses(sums, np.full(len(windows), windows.shape[1] - 1))


def perplexity_of(losses: WindowLosses) -> Perplexity:
    """Perplexity with its interval from the losses of some windows."""
    found = window_estimate(losses.sums, losses.counts).exponential()
    return Perplexity(found.value, found.low, found.high, found.rows)


def ratio(losses: WindowLosses, base: WindowLosses) -> PerplexityRatio:
    """Perplexity ratio of a model to the base model, from the losses of both on the same windows.

    Most of the variation between windows is common to both models and cancels in the difference
    of their losses, so this interval is far narrower than those of the two perplexities. Raises
    MlxSvdError if the windows differ in number or length.
    """
    if not np.array_equal(losses.counts, base.counts):
        raise MlxSvdError(
            "perplexity ratio: the two models were scored on different windows; score both on "
            "the same ones"
        )
    found = window_estimate(losses.sums - base.sums, base.counts).exponential()
    return PerplexityRatio(found.value, found.low, found.high, found.n)


def perplexity(model: nn.Module, tokens: Sequence[int], window: int = 512) -> Perplexity:
    """Perplexity of a tokenized text in consecutive windows.

    A rest shorter than a quarter of a window is left out. Raises MlxSvdError for a shorter text.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    full = len(ids) // window
    parts = [ids[: full * window].reshape(full, window)] if full else []
    rest = ids[full * window :]
    if len(rest) >= max(2, window // 4):
        parts.append(rest[None])
    if not parts:
        raise MlxSvdError(
            f"text of {len(ids)} tokens: less than a quarter of a window of {window}; give a "
            "longer text or a shorter window"
        )
    return perplexity_of(reduce(add, (window_losses(model, part) for part in parts)))
