"""The same quantities from the logits in plain numpy, one sequence at a time."""

import mlx.core as mx
import numpy as np


def log_probs(model, ids) -> np.ndarray:
    """(len(ids) - 1, vocabulary) float64: of the token after each position but the last."""
    logits = np.array(model(mx.array(ids)[None])[0].astype(mx.float32), dtype=np.float64)[:-1]
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def losses(model, ids) -> np.ndarray:
    """(len(ids) - 1,) negative log-likelihood of every token but the first."""
    return -log_probs(model, ids)[np.arange(len(ids) - 1), np.asarray(ids)[1:]]
