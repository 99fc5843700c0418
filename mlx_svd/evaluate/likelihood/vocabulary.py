"""Log-probabilities of single words from logits, without writing out a softmax."""

import mlx.core as mx
import numpy as np

from mlx_svd.x86.pointwise import log_normalizers


def on_cpu() -> bool:
    """Does MLX compute on the CPU? Then its arrays are numpy's too, without a copy."""
    return mx.default_device() == mx.Device(mx.cpu)


def word_log_probs(logits: mx.array, rows: np.ndarray, words: np.ndarray) -> np.ndarray:
    """logits (n, V) float32; rows, words (m,) -> log P(word) at that row, (m,) float64."""
    if not on_cpu():
        picked = logits[mx.array(rows), mx.array(words)]
        return np.array(picked - mx.logsumexp(logits, axis=-1)[mx.array(rows)], dtype=np.float64)
    # MLX's exponential on x86 takes twelve times as long as numpy's.
    values = np.asarray(logits)
    return values[rows, words].astype(np.float64) - log_normalizers(values)[rows]
