"""What a change of the weights does to the model's predictions."""

from dataclasses import dataclass

import numpy as np

from mlx_svd.analyze.subject import Subject
from mlx_svd.evaluate.divergence import window_divergences
from mlx_svd.evaluate.perplexity import (
    Perplexity,
    PerplexityRatio,
    WindowLosses,
    perplexity_of,
    ratio,
)
from mlx_svd.evaluate.statistics.intervals import Estimate, estimate_of_sums


@dataclass(frozen=True)
class Effect:
    """The model as it is now against the uncompressed one on the same windows. kl: KL(base ||
    model) in nats a token; agreement: share of positions with the same most probable token;
    perplexity, perplexity_ratio: of the text; window_kl: mean KL of each window, which the
    bootstraps resample."""

    kl: Estimate
    agreement: Estimate
    perplexity: Perplexity
    perplexity_ratio: PerplexityRatio
    window_kl: list[float]


def effect(subject: Subject) -> Effect:
    """Measure the model in its present state. Raises MlxSvdError for NaN."""
    kl, agree, losses = window_divergences(subject.model, subject.base, subject.windows.tokens)
    counts = np.full(len(kl), subject.windows.tokens.shape[1] - 1)
    now = WindowLosses(losses, counts)
    return Effect(
        estimate_of_sums(kl, counts),
        estimate_of_sums(agree, counts),
        perplexity_of(now),
        ratio(now, base_losses(subject)),
        (kl / counts).tolist(),
    )


def base_losses(subject: Subject) -> WindowLosses:
    """Of the uncompressed model, from its kept predictions."""
    tokens, kept = subject.windows.tokens, subject.base.log_probs
    targets = tokens[:, 1:, None].astype(np.int64)
    sums = [
        -float(np.take_along_axis(row, target, axis=-1).astype(np.float64).sum())
        for row, target in zip(kept, targets, strict=True)
    ]
    return WindowLosses(np.array(sums), np.full(len(tokens), tokens.shape[1] - 1))
