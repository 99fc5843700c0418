"""Keys and values of prompts of different lengths, shared by the texts that go on from them."""

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import create_attention_mask

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.split import SplitModel, check_equal


class PrefixCache:
    """The cache of one layer, in the form that mlx-lm's models take.

    keys, values: (R or 1, heads, P, D), or None for no prefix; offset: how many of the P positions
    count, an int for all rows or int32 (R,) where rows are padded on the right. What the model
    computes is kept in ``keys`` and ``values`` behind the prefix, and ``offset`` counts it too.
    """

    def __init__(
        self,
        keys: mx.array | None = None,
        values: mx.array | None = None,
        offset: int | mx.array = 0,
        mask_axes: int = 4,
    ):
        self.keys, self.values = keys, values
        self._lengths = offset
        self._prefix = 0 if keys is None else keys.shape[2]
        self._new = 0
        self._mask_axes = mask_axes

    @property
    def offset(self) -> int | mx.array:
        """Position of the next token: an int, or int32 (R,)."""
        return self._lengths + self._new

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """New keys and values (B, heads, N, D) -> those of prefix and new tokens."""
        self._new += keys.shape[2]
        if self.keys is None:
            self.keys, self.values = keys, values
        else:
            self.keys = _joined(self.keys, keys)
            self.values = _joined(self.values, values)
        return self.keys, self.values

    def size(self) -> int:
        """Positions kept, padding included."""
        return self._prefix + self._new

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Which of the kept positions and themselves N new tokens may look at."""
        if isinstance(self._lengths, int):
            return create_attention_mask(N, self.offset, return_array, window_size)
        old, new = mx.arange(self._prefix), mx.arange(self._new + N)
        at, lengths = mx.arange(self._new, self._new + N)[:, None], self._lengths[:, None, None]
        rows = len(self._lengths)
        prefix = mx.broadcast_to(old < lengths, (rows, N, self._prefix))
        causal = at >= new
        if window_size is not None:
            # The distance to the prefix is counted from its end, not from that of its padding.
            prefix = prefix & (lengths + at - old < window_size)
            causal = causal & (at - new < window_size)
        causal = mx.broadcast_to(causal, (rows, N, self._new + N))
        mask = mx.concatenate([prefix, causal], axis=-1)
        return mx.expand_dims(mask, tuple(range(1, self._mask_axes - 2)))

    def rows(self, prompts: mx.array, lengths: mx.array) -> "PrefixCache":
        """A cache whose row i goes on from row prompts[i], of which lengths[i] positions count."""
        if self.keys.shape[0] > 1:
            keys, values = self.keys[prompts], self.values[prompts]
        else:
            keys, values = self.keys, self.values
        return PrefixCache(keys, values, lengths, self._mask_axes)


def _joined(prefix: mx.array, new: mx.array) -> mx.array:
    """Along the positions; a prefix of one row serves all."""
    prefix = mx.broadcast_to(prefix, (new.shape[0], *prefix.shape[1:]))
    return mx.concatenate([prefix, new], axis=2)


def mask_axes(split: SplitModel) -> int:
    """Axes that this model's attention needs in a mask with one row for each text.

    Four, or five in models that group queries by their keys (Gemma 2). Found by comparing texts
    after prompts of different lengths with the same texts in one piece; raises MlxSvdError if
    neither gives the model's own logits.
    """
    texts = np.arange(2 * 7).reshape(2, 7) % split.vocabulary
    lengths, reason = (3, 5), None
    whole = [texts[row, : n + 2] for row, n in enumerate(lengths)]
    expected = mx.stack([split.model(mx.array(text)[None])[0, -2:] for text in whole])
    for axes in (4, 5):
        caches = [PrefixCache(mask_axes=axes) for _ in range(split.layers)]
        split.hidden(mx.array(texts[:, :5]), caches)
        caches = [cache.rows(mx.array([0, 1]), mx.array(lengths)) for cache in caches]
        after = mx.array(np.stack([texts[row, n : n + 2] for row, n in enumerate(lengths)]))
        try:
            hidden = split.hidden(after, caches)
            found = split.logits(hidden.reshape(4, -1)).reshape(2, 2, -1)
            check_equal(split.model, "texts after kept prompts", found, expected)
        except (ValueError, MlxSvdError) as error:  # ValueError: shapes that do not broadcast
            reason = error
        else:
            return axes
    raise MlxSvdError(str(reason)) from reason
