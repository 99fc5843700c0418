"""Forward passes over windows of tokens, in batches that the logits allow."""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.x86 import numpy_exponentials

# Bytes of one batch of float32 logits, which over a large vocabulary are the largest arrays.
LOGIT_BYTES = 1 << 28


def vocabulary_size(model: nn.Module) -> int:
    """Logits per token. MLX knows the shape without computing anything."""
    return model(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]


def next_token_logits(
    model: nn.Module, windows: np.ndarray
) -> Iterator[tuple[slice, mx.array, mx.array]]:
    """windows (N, L) int -> batches of (rows of windows, logits (b, L-1, V) float32, targets
    (b, L-1)); the logits at a position predict the target at the same position.

    Raises MlxSvdError for windows of fewer than two tokens or with ids that the model lacks: MLX
    would read past the end of the embedding.
    """
    if windows.ndim != 2 or windows.shape[1] < 2 or not len(windows):
        raise MlxSvdError(
            f"windows of shape {windows.shape}: need at least one window of two tokens or more"
        )
    vocabulary = vocabulary_size(model)
    outside = windows[(windows < 0) | (windows >= vocabulary)]
    if len(outside):
        raise MlxSvdError(
            f"token id {outside[0]} is beyond the model's vocabulary of {vocabulary}; "
            "tokenizer and model do not belong together"
        )
    step = max(1, LOGIT_BYTES // (4 * vocabulary * windows.shape[1]))
    for start in range(0, len(windows), step):
        rows = slice(start, min(start + step, len(windows)))
        tokens = mx.array(windows[rows].astype(np.int32))
        with numpy_exponentials(model):
            logits = model(tokens[:, :-1])
        yield rows, logits.astype(mx.float32), tokens[:, 1:]


def written_out(model: nn.Module) -> nn.Module:
    """The model with its quantized layers dequantized in place, if it runs on a CPU.

    The weights keep their quantized values; only the format in memory changes. MLX's CPU backend
    multiplies packed weights about ten times slower than it dequantizes and multiplies them. On a
    GPU the model is returned as it is. Do not measure speed or bytes on the result.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return model
    from mlx_lm.utils import dequantize_model

    model = dequantize_model(model)
    mx.eval(model.parameters())
    return model
