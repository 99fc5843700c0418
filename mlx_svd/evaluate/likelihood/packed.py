"""Many texts of different lengths in one pass, without padding.

Every token is a row of its own for the model, which computes everything but attention row by row;
its attention is replaced by one that knows which rows are a text (``x86.packed_attention``). Only
where numpy computes attention, and for models that leave it to MLX's function.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.batches import Batch, clusters
from mlx_svd.evaluate.likelihood.encode import EncodedItem
from mlx_svd.evaluate.likelihood.passes import Row, passes
from mlx_svd.evaluate.likelihood.split import SplitModel, check_equal
from mlx_svd.x86 import slow_exponentials
from mlx_svd.x86.packed_attention import Group, Prefix, packed_attention

# Token ids below it are used to find out whether a model packs.
_IDS = 10


@dataclass(frozen=True)
class Packed:
    """tokens of all rows; starts: where each row of the prompts, then of what follows, begins;
    groups: of a prompt and what follows it."""

    tokens: np.ndarray
    starts: list[int]
    groups: list[Group]


class PackedPasses:
    """Passes of one model that ``packs``."""

    def __init__(self, split: SplitModel):
        self.split = split

    def batches(self, items: Sequence[EncodedItem], max_length: int, tokens: int) -> list[Batch]:
        """Every item in exactly one batch of at most so many tokens, if it is not longer; batches
        of items with a common prefix have about as many each, if they can."""
        return [
            Batch(tuple(part), shared)
            for members, shared in clusters(items)
            for part in _parts({i: _size(items[i], shared) for i in members}, tokens)
        ]

    def prefix(self, tokens: Sequence[int]) -> list[Prefix]:
        """Keys and values of a text that others go on from, of every layer."""
        kept: list[Prefix] = []
        self._hidden(pack([Row(tuple(tokens), 0)], []), [], kept)
        return kept

    def hidden(
        self, prompts: list[Row], following: list[Row], before: list[Prefix]
    ) -> Iterator[tuple[mx.array, list[Row], list[int]]]:
        """(hidden states (N, D), rows, where in N each row begins), all in one pass, behind
        ``before`` if there is any."""
        packed = pack(prompts, following)
        yield self._hidden(packed, before), [*prompts, *following], packed.starts

    def _hidden(
        self, packed: Packed, before: list[Prefix], kept: list[Prefix] | None = None
    ) -> mx.array:
        attention = _Attention(packed.groups, len(before[0].keys) if before else 0, kept)
        caches = [_Cache(attention, prefix) for prefix in (before or [None] * self.split.layers)]
        return self.split.hidden(mx.array(packed.tokens)[:, None], caches, attention)[:, 0]


def _parts(sizes: dict[int, int], tokens: int) -> list[list[int]]:
    """Items in their order, in parts that respect the tokens, of about equal size if possible."""
    filled: list[list[int]] = []
    room = 0
    for i, size in sizes.items():
        if size > room:
            filled.append([])
            room = tokens
        filled[-1].append(i)
        room -= size
    even: dict[int, list[int]] = defaultdict(list)
    before, total = 0, sum(sizes.values())
    for i, size in sizes.items():
        even[int((before + size / 2) * len(filled) / total)].append(i)
        before += size
    fits = all(sum(sizes[i] for i in part) <= tokens for part in even.values())
    return list(even.values()) if fits else filled


def _size(item: EncodedItem, shared: int) -> int:
    return sum(len(row.tokens) for rows in passes([item], shared) for row in rows)


def pack(prompts: Sequence[Row], following: Sequence[Row]) -> Packed:
    """Every prompt, directly behind it what goes on from it."""
    after: list[list[int]] = [[] for _ in prompts]
    for number, row in enumerate(following, len(prompts)):
        after[row.prompt].append(number)
    rows = [*prompts, *following]
    tokens: list[int] = []
    starts, groups = [0] * len(rows), []
    for number, others in enumerate(after):
        together = [number, *others]
        groups.append(Group(len(tokens), tuple(len(rows[i].tokens) for i in together)))
        for i in together:
            starts[i] = len(tokens)
            tokens += rows[i].tokens
    return Packed(np.array(tokens, dtype=np.int32), starts, groups)


class _Attention:
    """In place of mx.fast.scaled_dot_product_attention. prefix: of the layer that computes; kept:
    where to put the keys and values of each."""

    def __init__(self, groups: list[Group], before: int, kept: list[Prefix] | None):
        self.groups, self.kept = groups, kept
        self.prefix: Prefix | None = None
        self.windows: list[tuple[mx.array, int]] = []
        places = np.concatenate([group.places for group in groups])
        self.places = mx.array((before + places).astype(np.int32))

    def __call__(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: mx.array | None = None,
        **others: Any,
    ) -> mx.array:
        """(N, H, 1, D), (N, K, 1, D) -> (N, H, 1, D)."""
        arrays = (queries, keys, values)
        windows = [size for made, size in self.windows if made is mask]
        known = (mask is None or windows) and all(other is None for other in others.values())
        if not known or any(array.dtype != mx.float32 for array in arrays):
            raise NotImplementedError("attention of another kind")
        mx.eval(arrays)
        asked, *seen = (np.asarray(array)[:, :, 0] for array in arrays)
        if self.kept is not None:
            self.kept.append(Prefix(*seen))
        found = packed_attention(
            asked,
            *seen,
            self.groups,
            scale=scale,
            prefix=self.prefix,
            window=windows[0] if windows else None,
        )
        return mx.array(found)[:, :, None]


class _Cache:
    """The cache of one layer, in the form that mlx-lm's models take; every row is a text."""

    def __init__(self, attention: _Attention, prefix: Prefix | None):
        self.attention, self.prefix = attention, prefix
        self.offset = attention.places

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Returns keys and values (N, K, 1, D) as they are; attention is next."""
        self.attention.prefix = self.prefix
        return keys, values

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | None:
        """No mask, but something that stands for the window, if attention has one."""
        if window_size is None:
            return None
        self.attention.windows.append((mx.zeros((1, 1)), window_size))
        return self.attention.windows[-1][0]


def packs(split: SplitModel) -> bool:
    """Can this model's texts be packed, with its own logits as result? Found by comparing texts
    after prompts after a common beginning with the same texts in one piece."""
    if not slow_exponentials() or split.vocabulary < _IDS:
        return False
    prefix, lasts = (3, 1), ((5, 2), (7, 4, 6))
    prompts = [Row((8,), 0), Row((9, 2, 8), 1)]
    following = [Row(tokens, prompt) for prompt in (0, 1) for tokens in lasts]
    whole = [prefix + prompts[row.prompt].tokens + row.tokens for row in following]
    try:
        run = PackedPasses(split)
        hidden, rows, starts = next(run.hidden(prompts, following, run.prefix(prefix)))
        ends = [start + len(row.tokens) - 1 for start, row in zip(starts, rows, strict=True)]
        found = split.logits(hidden[mx.array(ends[len(prompts) :])])
        expected = mx.stack([split.model(mx.array(text)[None])[0, -1] for text in whole])
        check_equal(split.model, "packed texts", found, expected)
    # Whatever a model's own attention makes of rows that are texts, it is not packed then.
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError,
            ValueError, MlxSvdError):  # fmt: skip
        return False
    return True
