"""Log-probabilities of single words from logits, without writing out a softmax."""

import mlx.core as mx
import numpy as np

# Rows that are normalized at a time, so that numpy's copies stay in the processor's cache.
_ROWS = 16


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


def log_normalizers(logits: np.ndarray) -> np.ndarray:
    """log(sum(exp(logits))) of every row of (n, V) float32, float64; NaN where a row has one."""
    found = np.empty(len(logits))
    buffer = np.empty((min(_ROWS, len(logits)), logits.shape[1]), dtype=np.float32)
    # An overflow to infinity is found by the caller, with the item's name.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(logits), _ROWS):
            part = logits[start : start + _ROWS]
            shifted, largest = buffer[: len(part)], part.max(axis=1)
            np.subtract(part, largest[:, None], out=shifted)
            np.exp(shifted, out=shifted)
            found[start : start + _ROWS] = largest + np.log(shifted.sum(axis=1, dtype=np.float64))
    return found
