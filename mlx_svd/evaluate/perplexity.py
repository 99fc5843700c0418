"""Perplexity of a text in windows of equal length."""

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class Perplexity:
    """perplexity = exp(mean negative log-likelihood of a token); low, high: 95 % interval from
    the variation between windows; tokens: how many were scored."""

    perplexity: float
    low: float
    high: float
    tokens: int


def perplexity(model: nn.Module, tokens: list[int], window: int = 512) -> Perplexity:
    """Score a tokenized text in consecutive windows; within each, every token but the first.

    A rest shorter than a quarter of a window is left out.
    """
    starts = range(0, len(tokens) - 1, window)
    windows = [tokens[s : s + window] for s in starts if len(tokens) - s >= window // 4]
    losses = [_window_losses(model, mx.array(part)[None]) for part in windows]
    total = sum(sum_ for sum_, _ in losses)
    count = sum(n for _, n in losses)
    mean = total / count
    means = [sum_ / n for sum_, n in losses]
    spread = math.sqrt(sum((m - mean) ** 2 for m in means) / max(1, len(means) - 1) / len(means))
    half = 1.96 * spread
    return Perplexity(math.exp(mean), math.exp(mean - half), math.exp(mean + half), count)


def _window_losses(model: nn.Module, inputs: mx.array) -> tuple[float, int]:
    logits = model(inputs[:, :-1]).astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, inputs[:, 1:], reduction="sum")
    return float(losses.item()), inputs.shape[1] - 1
