"""The seed documents' composite score: 0.4 facts + 0.4 MMLU + 0.2 reasoning. No chance level.

Facts and reasoning by exact match of generated text (--scoring seed: the originals' substring
rule), MMLU by acc. One number hides which of them moved; read the three tasks beside it.
"""

import math

from mlx_svd.evaluate.jobs.job import Score
from mlx_svd.strict_json import finite

NAME = "composite"
# task, metric, weight
PARTS = (("facts", "exact_match", 0.4), ("mmlu", "acc", 0.4), ("reasoning", "exact_match", 0.2))


def composite(scores: dict[str, dict[str, Score]]) -> Score:
    """The weighted mean of task -> metric -> score. Items of the three tasks are independent, so
    their variances add; the interval is made of those of the parts, square and add (Newcombe,
    Statistics in Medicine 17, 1998), so that a part that is all right or all wrong has its width
    too."""
    parts = [(scores[task][metric], weight) for task, metric, weight in PARTS]
    value = sum(weight * score.value for score, weight in parts)
    errors = [math.inf if s.stderr is None else s.stderr for s, _ in parts]
    stderr = math.sqrt(sum((w * e) ** 2 for (_, w), e in zip(parts, errors, strict=True)))
    low, high = (
        math.sqrt(sum((weight * (bound(score) - score.value)) ** 2 for score, weight in parts))
        for bound in (lambda score: score.low, lambda score: score.high)
    )
    n = sum(score.n for score, _ in parts)
    return Score(value, finite(stderr), max(0.0, value - low), min(1.0, value + high), n)
