"""Greedy generation in batches, with the caches of the scorer."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.prefix_cache import PrefixCache
from mlx_svd.evaluate.likelihood.split import SplitModel


def greedy_tokens(
    split: SplitModel,
    mask_axes: int,
    prompts: Sequence[Sequence[int]],
    count: int,
    stop: frozenset[int] = frozenset(),
    names: Sequence[str] | None = None,
) -> list[list[int]]:
    """The ``count`` most probable tokens after each prompt, one after the other.

    A row ends before a token of ``stop``. The longest prompt and ``count`` tokens must fit into
    the model's context. ``names``: of the prompts, for the
    MlxSvdError about logits that are not finite.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max()), dtype=np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    caches = [PrefixCache(mask_axes=mask_axes) for _ in range(split.layers)]
    hidden = split.hidden(mx.array(tokens), caches)
    last = hidden[mx.arange(len(prompts)), mx.array(lengths - 1)]
    every = mx.arange(len(prompts))
    caches = [cache.rows(every, mx.array(lengths)) for cache in caches]
    found: list[list[int]] = [[] for _ in prompts]
    ended = np.zeros(len(prompts), dtype=bool)
    for step in range(count):
        best = _best(split, last, names)
        ended |= np.isin(best, list(stop))
        for row in np.flatnonzero(~ended):
            found[row].append(int(best[row]))
        if ended.all() or step == count - 1:
            break
        last = split.hidden(mx.array(best[:, None]), caches)[:, -1]
    return found


def _best(split: SplitModel, hidden: mx.array, names: Sequence[str] | None) -> np.ndarray:
    logits = split.logits(hidden)
    best, largest = mx.argmax(logits, axis=-1), logits.max(axis=-1)
    mx.eval(best, largest)
    finite = np.isfinite(np.array(largest))
    if not finite.all():
        row = int(np.argmin(finite))
        raise MlxSvdError(
            f"{names[row] if names else f'prompt {row}'}: a logit of the next token is not finite; "
            "the model overflows or holds NaN, load it in float32 or make the checkpoint again"
        )
    return np.array(best).astype(np.int32)
