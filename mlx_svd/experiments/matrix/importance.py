"""The seeds' importance: mean absolute gradient of the loss on a handful of prompts.

Seed 004: G = sum over prompts of abs(dL/dW), L the language-model loss of the whole sentence, one
at a time; the score of a component is sum(abs(sigma_j u_j v_j^T) * G). Its prompts were among the
facts that were then asked. Here they are not, unless a condition is ``leaky`` to show what that
does.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_svd.analyze.subject import Subject
from mlx_svd.calibrate.taps import gradients_of, tapped
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.facts import Fact
from mlx_svd.experiments.matrix.material import Facts

# As many as the seed's.
PROMPTS = 7


def prompt_sentences(facts: Facts, seed: int, count: int, *, leaky: bool) -> list[str]:
    """``count`` true sentences drawn by the seed: from the facts that are set aside, or, leaky,
    from those that are asked. Raises MlxSvdError if there are too few."""
    pool: Sequence[Fact] = facts.test if leaky else facts.reserve
    if len(pool) < count:
        raise MlxSvdError(
            f"importance: {count} prompts are wanted and {len(pool)} facts are "
            f"{'asked' if leaky else 'set aside'}; give facts a larger reserve"
        )
    drawn = np.random.default_rng([seed, 13]).choice(len(pool), count, replace=False)
    return [f"{pool[i].prompt} {pool[i].object}." for i in sorted(drawn)]


def mean_absolute_gradients(subject: Subject, sentences: Sequence[str]) -> dict[str, np.ndarray]:
    """Path of every projection -> E abs(dL/dW) (m, n) float64 over sentences, L the mean loss of a
    sentence's tokens, of the model as it is now. Raises MlxSvdError for NaN."""
    linears = subject.source.linears
    outputs = [sum(p.shape[0] for p in linear.projections) for linear in linears]
    sums: dict[str, np.ndarray] = {}
    with tapped(subject.model, linears) as taps:
        for sentence in sentences:
            tokens = mx.array(subject.tokenizer.encode(sentence))[None]
            if tokens.shape[1] < 2:
                raise MlxSvdError(f"importance: the prompt {sentence!r} has fewer than 2 tokens")
            _, inputs, gradients = gradients_of(subject.model, taps, tokens, outputs)
            for linear, x, gradient in zip(linears, inputs, gradients, strict=True):
                rows = linear.split(gradient.T)
                for p in linear.projections:
                    value = np.array(mx.abs(rows[p.name] @ x / len(x)), dtype=np.float64)
                    if not np.isfinite(value.sum()):
                        raise MlxSvdError(f"{p.path}: its gradient on {sentence!r} is not finite")
                    sums[p.path] = sums.get(p.path, 0.0) + value / len(sentences)
    return sums
