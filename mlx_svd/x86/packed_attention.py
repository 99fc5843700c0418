"""Attention among texts that lie one after the other in one array, without padding, by numpy.

Shapes: N rows (tokens of all texts), H heads of queries, K of keys, D components. A block of scores
is made, normalized and used up while it is in the processor's cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mlx_svd.x86.attention import QUERIES, SCORES
from mlx_svd.x86.workers import in_parts

# Groups of up to so many rows keep what is hidden from each row: all layers hide the same.
_KEPT = 1024


@dataclass(frozen=True)
class Group:
    """Neighbouring rows that see each other: a text, then others that go on from it, each of which
    sees the first one and itself. start: first row; lengths: rows of each, the first one first."""

    start: int
    lengths: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of all texts."""
        return sum(self.lengths)

    @cached_property
    def places(self) -> np.ndarray:
        """(rows,) place of each row in its text, counted from the beginning of the first one."""
        first, *others = self.lengths
        return np.concatenate([np.arange(first), *(first + np.arange(n) for n in others)])

    def bias(self, start: int, end: int) -> np.ndarray:
        """(end - start, m): minus infinity where one of these rows does not see one of the last m
        rows up to ``end``, else 0; all rows before those are seen."""
        found = self._biases.get(start)
        if found is None:
            found = self._bias(start, end)
            if self.rows <= _KEPT:
                self._biases[start] = found
        return found

    @cached_property
    def _biases(self) -> dict[int, np.ndarray]:
        return {}

    def _bias(self, start: int, end: int) -> np.ndarray:
        # Earlier rows of the first text are seen by all.
        row = np.arange(min(start, self.lengths[0]), end)
        text = np.searchsorted(np.cumsum(self.lengths), row, side="right")
        own = slice(start - row[0], None)
        seen = (row[own, None] >= row) & ((text == 0) | (text[own, None] == text))
        return np.where(seen, np.float32(0), np.float32(-np.inf))


@dataclass(frozen=True)
class Prefix:
    """keys, values (P, K, D) of what stands before every text."""

    keys: np.ndarray
    values: np.ndarray


def packed_attention(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    groups: Sequence[Group],
    *,
    scale: float,
    prefix: Prefix | None = None,
    window: int | None = None,
) -> np.ndarray:
    """queries (N, H, D), keys, values (N, K, D), float32 -> (N, H, D).

    groups: cover all rows; scale: of the scores; prefix: is seen by all; window: rows see that many
    places back, themselves included.
    """
    work = _Work(queries, keys, values, np.float32(scale), prefix, window)
    parts = [part for group in groups for part in work.parts(group)]
    # The longest first, so that threads end at the same time.
    parts.sort(key=lambda part: -part[0].rows * (part[1].stop - part[1].start))
    found = np.empty((*queries.shape[:2], values.shape[-1]), np.float32)
    in_parts(lambda part: work.attend(*part, found), parts)
    return found


@dataclass(frozen=True)
class _Work:
    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    scale: np.float32
    prefix: Prefix | None
    window: int | None

    @property
    def before(self) -> int:
        """Places of the prefix."""
        return len(self.prefix.keys) if self.prefix else 0

    def parts(self, group: Group) -> list[tuple[Group, slice]]:
        """(group, heads of keys) whose scores are worked on together."""
        heads, each = self.keys.shape[1], self.queries.shape[1] // self.keys.shape[1]
        one = each * min(group.rows, QUERIES) * (self.before + group.rows)
        step = max(1, SCORES // one)
        return [(group, slice(i, min(i + step, heads))) for i in range(0, heads, step)]

    def attend(self, group: Group, heads: slice, found: np.ndarray) -> None:
        """Write the outputs of a group's rows and the queries of these heads of keys."""
        count, each = heads.stop - heads.start, self.queries.shape[1] // self.keys.shape[1]
        asked = slice(heads.start * each, heads.stop * each)
        for start in range(0, group.rows, QUERIES):
            end = min(start + QUERIES, group.rows)
            rows = slice(group.start + start, group.start + end)
            seen = slice(group.start, group.start + end)
            queries = (self.queries[rows, asked] * self.scale).swapaxes(0, 1)
            queries = queries.reshape(count, each * (end - start), -1)
            scores = np.empty((*queries.shape[:2], self.before + end), np.float32)
            earlier, own = scores[..., : self.before], scores[..., self.before :]
            np.matmul(queries, self.keys[seen, heads].transpose(1, 2, 0), out=own)
            if self.prefix:
                np.matmul(queries, self.prefix.keys[:, heads].transpose(1, 2, 0), out=earlier)
            self._hide(scores.reshape(count, each, end - start, -1), group, start, end)
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            out = own @ self.values[seen, heads].swapaxes(0, 1)
            if self.prefix:
                out += earlier @ self.prefix.values[:, heads].swapaxes(0, 1)
            out /= scores.sum(axis=-1, keepdims=True)
            found[rows, asked] = out.reshape(count * each, end - start, -1).swapaxes(0, 1)

    def _hide(self, scores: np.ndarray, group: Group, start: int, end: int) -> None:
        """Set to minus infinity what rows from start to end do not see of prefix and group."""
        bias = group.bias(start, end)
        scores[..., -bias.shape[1] :] += bias
        if self.window is not None:
            places = np.concatenate([np.arange(self.before), self.before + group.places[:end]])
            far = (self.before + group.places[start:end, None]) - places >= self.window
            scores[..., far] = -np.inf
