"""KL divergence of the student's next-token distribution from the teacher's."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.x86 import logsumexp


def log_softmax(logits: mx.array) -> mx.array:
    """Over the last axis, in float32."""
    logits = logits.astype(mx.float32)
    return logits - logsumexp(logits)[..., None]


def mean_kl(teacher: mx.array, student: mx.array) -> mx.array:
    """Mean over tokens of KL(teacher || student) in nats, over the full vocabulary.

    teacher: float32 log-probabilities (..., vocabulary); student: logits of the same shape.
    """
    # Summed token by token first: one float32 sum over all would lose digits.
    return (mx.exp(teacher) * (teacher - log_softmax(student))).sum(axis=-1).mean()


def teacher_log_probabilities(teacher: nn.Module, tokens: mx.array) -> mx.array:
    """Float32 (1, length, vocabulary) of one window (length,); evaluated, without gradient."""
    targets = log_softmax(teacher(tokens[None]))
    mx.eval(targets)
    return targets


def validation_kl(
    teacher: nn.Module, student: Callable[[mx.array], mx.array], windows: np.ndarray
) -> float:
    """Mean KL per token over windows (count, length) of equal length, one at a time."""
    total = 0.0
    for window in windows:
        tokens = mx.array(window)
        targets = teacher_log_probabilities(teacher, tokens)
        total += float(mean_kl(targets, student(tokens[None])).item())
    return total / len(windows)
