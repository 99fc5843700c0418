"""Does a compressed model drift away because it reads its own words? Teacher-forced against
free-running agreement with the dense model's greedy text.

Teacher-forced: the compressed model reads the dense model's text and names the next token.
Free-running: it writes its own text after the same prompt. If the errors of different tokens were
independent, the share of prompts whose texts are still identical after t tokens would be the
product of the teacher-forced agreements up to t. A compressed model that falls out of step sees
another text from there on, so agreement at t alone says little after the first difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.statistics.intervals import Estimate, estimate, estimate_of_sums

# Stands where a text ended before.
_ENDED = -1


@dataclass(frozen=True)
class Agreement:
    """teacher_forced: share of tokens of the dense texts that the model names, by prompt;
    identical: share of whole texts that are the same; first_difference: median position of the
    first different token (the length where there is none); by_token: for t = 1...T teacher-forced
    and free-running agreement at t, the share of texts identical up to t, and what independent
    errors would give."""

    teacher_forced: Estimate
    identical: Estimate
    first_difference: float
    by_token: dict[str, list[float]]


def agreement(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    dense: Sequence[Sequence[int]],
    own: Sequence[Sequence[int]],
) -> Agreement:
    """model: as compressed now; prompts: token ids; dense, own: what the dense model and this one
    wrote greedily after each. Raises MlxSvdError if the dense model wrote nothing at all."""
    length = max(map(len, dense))
    if not length:
        raise MlxSvdError("agreement: the dense model ends every text at once; give other prompts")
    expected, written = (_padded(texts, length) for texts in (dense, own))
    named = np.array(
        [_named(model, prompt, text, length) for prompt, text in zip(prompts, dense, strict=True)]
    )
    exists = expected != _ENDED
    right = (named == expected) & exists
    same = written == expected
    still = np.logical_and.accumulate(same, axis=1)
    texts = exists.any(axis=1)
    count = np.maximum(exists.sum(axis=0), 1)
    forced = right.sum(axis=0) / count
    return Agreement(
        estimate_of_sums(right.sum(axis=1)[texts], exists.sum(axis=1)[texts]),
        estimate(still[:, -1].astype(float)),
        float(np.median(still.sum(axis=1))),
        {
            "teacher_forced": forced.tolist(),
            "free_running": ((same & exists).sum(axis=0) / count).tolist(),
            "identical": still.mean(axis=0).tolist(),
            "identical_if_independent": np.cumprod(forced).tolist(),
        },
    )


def _padded(texts: Sequence[Sequence[int]], length: int) -> np.ndarray:
    rows = [(list(text) + [_ENDED] * length)[:length] for text in texts]
    return np.array(rows, dtype=np.int64)


def _named(model: nn.Module, prompt: Sequence[int], text: Sequence[int], length: int) -> np.ndarray:
    """The most probable token (length,) at each place of ``text``; ended where it ended."""
    named = np.full(length, _ENDED - 1)
    if len(text):
        tokens = mx.array([*prompt, *text[:-1]])[None]
        logits = model(tokens)[0, len(prompt) - 1 :]
        named[: len(text)] = np.array(mx.argmax(logits, axis=-1))
    return named
