"""How far a changed model's logits are from the dense model's, with and without what all share.

The cosine of raw logits is high for any two models of one vocabulary: every position's logits hold
the same mean vector (frequent words, rare words). ``mean_removed`` takes the dense model's mean
logits over the text, and at each position the mean over the vocabulary, which softmax ignores, off
both before they are compared.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_svd.analyze.output_error import Jackknifed, cosine_of, jackknife
from mlx_svd.analyze.subject import Subject
from mlx_svd.evaluate.likelihood.forward import next_token_logits
from mlx_svd.evaluate.statistics.intervals import Estimate, estimate_of_sums


@dataclass(frozen=True)
class LogitError:
    """cosine: of the flattened raw logits, as the seeds measure it; mean_removed_cosine and
    relative_error (||difference|| / ||dense||): without the common part; kl: nats a token."""

    cosine: Jackknifed
    mean_removed_cosine: Jackknifed
    relative_error: Jackknifed
    kl: Estimate


class DenseLogits:
    """The uncompressed model's logits on the windows (N, L-1, V), kept in memory."""

    def __init__(self, subject: Subject):
        self._subject = subject
        batches = [np.array(x) for _, x, _ in next_token_logits(subject.model, self._tokens)]
        self._logits = np.concatenate(batches)
        centred = self._logits - self._logits.mean(axis=-1, keepdims=True)
        self._mean = mx.array(centred.mean(axis=(0, 1)))

    @property
    def _tokens(self) -> np.ndarray:
        return self._subject.windows.tokens

    def sums(self) -> np.ndarray:
        """(N, 7) of each window, of the model as it is now: for raw logits y and changed ones
        y - e: y.y, y.e, e.e; the same three without the common part; KL."""
        found = []
        for rows, logits, _ in next_token_logits(self._subject.model, self._tokens):
            for row in range(rows.start, rows.stop):
                y, z = mx.array(self._logits[row]), logits[row - rows.start]
                parts = [*_products(y, y - z)]
                a, b = (x - x.mean(axis=-1, keepdims=True) - self._mean for x in (y, z))
                parts += _products(a, a - b)
                log_p, log_q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (y, z))
                parts.append(_total(mx.exp(log_p) * (log_p - log_q)))
                found.append(parts)
        return np.array(found)

    def error(self) -> LogitError:
        """Of the model as it is now."""
        return logit_error(self.sums(), self._tokens.shape[1] - 1)


def logit_error(sums: np.ndarray, tokens: int) -> LogitError:
    """From the sums (N, 7) of windows with ``tokens`` predictions each."""
    counts = np.full(len(sums), tokens)
    return LogitError(
        jackknife(sums[:, :3], lambda s: cosine_of(*s)),
        jackknife(sums[:, 3:6], lambda s: cosine_of(*s)),
        jackknife(sums[:, 3:6], lambda s: math.sqrt(s[2] / s[0])),
        estimate_of_sums(sums[:, 6], counts),
    )


def _products(y: mx.array, e: mx.array) -> list[float]:
    return [_total(y * y), _total(y * e), _total(e * e)]


def _total(values: mx.array) -> float:
    return float(np.array(values.sum(axis=-1), dtype=np.float64).sum())
