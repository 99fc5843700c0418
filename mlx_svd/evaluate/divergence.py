"""How far a model's next-token distributions are from those of the dense model."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.forward import next_token_logits
from mlx_svd.evaluate.perplexity import WindowLosses
from mlx_svd.evaluate.statistics.intervals import window_estimate


@dataclass(frozen=True)
class Divergence:
    """kl: mean KL(base || model) per token in nats, over the whole vocabulary; agreement: share
    of tokens at which both models rank the same token first; low and high of each: 95 % interval
    from the variation between windows; tokens: positions compared; losses: of the model on the
    same windows, which the same pass gives."""

    kl: float
    kl_low: float
    kl_high: float
    agreement: float
    agreement_low: float
    agreement_high: float
    tokens: int
    losses: WindowLosses


@dataclass(frozen=True)
class BaseDistribution:
    """What the base model predicts, kept for the rows of a sweep so that it runs once.

    windows (N, L) int; log_probs (N, L-1, V) float16 or float32: natural logarithms; best
    (N, L-1) int32: the most probable token before rounding, which makes ties. 8 windows of 512
    tokens over 16,384 words take 134 MB in float16.
    """

    windows: np.ndarray
    log_probs: np.ndarray
    best: np.ndarray


def base_distribution(
    base: nn.Module, windows: np.ndarray, dtype: type = np.float16
) -> BaseDistribution:
    """Run the base model on windows (N, L) and keep its log-probabilities in ``dtype``."""
    windows = np.asarray(windows)
    log_probs = best = None
    for rows, logits, _ in next_token_logits(base, windows):
        if log_probs is None:
            log_probs = np.empty((len(windows), *logits.shape[1:]), dtype=dtype)
            best = np.empty(log_probs.shape[:2], dtype=np.int32)
        log_probs[rows] = np.array(_log_softmax(logits))
        best[rows] = np.array(mx.argmax(logits, axis=-1))
    return BaseDistribution(windows, log_probs, best)


def kl_divergence(
    model: nn.Module, base: nn.Module | BaseDistribution, windows: np.ndarray
) -> Divergence:
    """KL(base || model) and top-1 agreement on windows (N, L) of token ids, in float32.

    base: the dense model, or its kept predictions on these very windows. Kept ones are normalized
    again, so that rounding to float16 leaves a proper distribution. Raises MlxSvdError if they
    belong to other windows or another vocabulary, or if the result is not finite.
    """
    kl, agree, sums = window_divergences(model, base, windows)
    counts = np.full(len(windows), np.asarray(windows).shape[1] - 1)
    mean = window_estimate(kl, counts, (0, math.inf))
    share = window_estimate(agree, counts, (0, 1))
    return Divergence(
        mean.value, mean.low, mean.high, share.value, share.low, share.high, mean.rows,
        WindowLosses(sums, counts),
    )  # fmt: skip


def window_divergences(
    model: nn.Module,
    base: nn.Module | BaseDistribution,
    windows: np.ndarray,
    names: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sum of KL(base || model) over the tokens of each window in nats, tokens at which both rank
    the same one first, negative log-likelihood of the window), (N,) float64 each; as
    :func:`kl_divergence`. names: of the windows in errors."""
    windows = np.asarray(windows)
    kl, agree, sums = (np.zeros(len(windows)) for _ in range(3))
    expected = _expected(base, windows)
    for rows, logits, targets in next_token_logits(model, windows):
        for row in range(rows.start, rows.stop):
            log_p, best = next(expected)
            log_q, target = _log_softmax(logits[row - rows.start]), targets[row - rows.start]
            if log_p.shape != log_q.shape:
                raise MlxSvdError(
                    f"KL divergence: the models have {log_q.shape[-1]} and {log_p.shape[-1]} "
                    "words; compare models of one vocabulary"
                )
            # Float32 sums over all positions at once lose the third digit.
            tokens = (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)
            kl[row] = np.array(tokens, dtype=np.float64).sum()
            agree[row] = (mx.argmax(log_q, axis=-1) == best).sum().item()
            losses = -mx.take_along_axis(log_q, target[:, None], axis=-1)
            sums[row] = np.array(losses, dtype=np.float64).sum()
    if not np.isfinite(kl).all():
        worst = int(np.argmin(np.isfinite(kl)))
        name = f"window {worst}" if names is None else names[worst]
        which = "a model" if np.isfinite(sums[worst]) else "the model"
        raise MlxSvdError(
            f"{name}: the KL divergence is not finite; {which} overflows or holds NaN, load it in "
            "float32 or make the checkpoint again"
        )
    return kl, agree, sums


def _expected(
    base: nn.Module | BaseDistribution, windows: np.ndarray
) -> Iterator[tuple[mx.array, mx.array]]:
    """(log-probabilities (L-1, V) float32, best (L-1,)) of the base model, window by window."""
    if isinstance(base, BaseDistribution):
        if not np.array_equal(base.windows, windows):
            raise MlxSvdError(
                "KL divergence: the base model's predictions were kept for other windows; give "
                "the same windows"
            )
        for log_probs, best in zip(base.log_probs, base.best, strict=True):
            yield _log_softmax(mx.array(log_probs).astype(mx.float32)), mx.array(best)
        return
    for _, logits, _ in next_token_logits(base, windows):
        for row in logits:
            yield _log_softmax(row), mx.argmax(row, axis=-1)


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
