"""Which items are scored together. It depends on the items alone, so that a resumed run and a run
on several machines compute the same batches, and so the same numbers."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_svd.evaluate.likelihood.encode import EncodedItem

# Padded tokens of one forward pass. More keep two cores no busier, and what a layer hands on would
# leave their cache. Not measured on a GPU.
BATCH_TOKENS = 1024
# Keys that the continuations of one batch may look at, in tokens per padded token.
_KEYS_PER_TOKEN = 16
# What a pass costs beside its padded tokens, in tokens: reading the weights, starting every layer.
# Measured on two cores: 10 to 29 ms where a token takes 0.1 to 0.55.
_PASS = 48
# A prefix that several items have in common is computed once from this length on.
_SHARED = 32


@dataclass(frozen=True)
class Batch:
    """items: indices, longest contexts first; shared: how many first tokens all their contexts
    have in common with the others of their cluster, whose keys and values are computed once."""

    items: tuple[int, ...]
    shared: int


@dataclass(frozen=True)
class Size:
    """rows and width of the prompts of some items, of the continuations after them, and the
    longest continuation."""

    rows: int
    width: int
    next_rows: int = 0
    next_width: int = 0

    def with_(self, other: "Size") -> "Size":
        """Of both together."""
        return Size(
            self.rows + other.rows,
            max(self.width, other.width),
            self.next_rows + other.next_rows,
            max(self.next_width, other.next_width),
        )

    def fits(self, shared: int, tokens: int, max_length: int) -> bool:
        """Can one batch be this large?"""
        keys = self.next_rows * (shared + self.width + self.next_width)
        return (
            self.rows * self.width <= tokens
            and self.next_rows * self.next_width <= tokens
            and keys <= _KEYS_PER_TOKEN * tokens
            # Padding may not reach past the last learned position: MLX would read other memory.
            and shared + self.width + self.next_width <= max_length
        )

    @property
    def cost(self) -> int:
        """In tokens. Continuations are cut anew, so they are taken to have no padding."""
        return self.rows * self.width + (2 * _PASS if self.next_rows else _PASS)


def make_batches(
    items: Sequence[EncodedItem], max_length: int, tokens: int = BATCH_TOKENS
) -> list[Batch]:
    """Every item in exactly one batch; an item is never divided.

    max_length: of the model; tokens: padded tokens of a forward pass, unless one item has more.
    """
    return [
        batch
        for members, shared in clusters(items)
        for batch in _cut(items, members, shared, max_length, tokens)
    ]


def clusters(items: Sequence[EncodedItem]) -> list[tuple[list[int], int]]:
    """(indices of items, how many first tokens all their contexts have in common), every item
    once; last those that have too little in common with others, with 0."""
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        alike[item.pairs[0][0][:_SHARED]].append(index)
    found, rest = [], []
    for members in alike.values():
        shared = _common(items, members)
        if shared < _SHARED or len(members) == 1:
            rest += members
        else:
            found.append((members, shared))
    return [*found, (rest, 0)] if rest else found


def _common(items: Sequence[EncodedItem], members: list[int]) -> int:
    """First tokens that all contexts of these items have in common, at most all but the last."""
    contexts = [context for i in members for context, _ in items[i].pairs]
    low, high = min(contexts), max(contexts)
    limit = min(len(context) for context in contexts) - 1
    same = (k for k, (a, b) in enumerate(zip(low, high, strict=False)) if a != b)
    return min(limit, next(same, limit))


def _cut(
    items: Sequence[EncodedItem], members: list[int], shared: int, max_length: int, tokens: int
) -> list[Batch]:
    sizes = {i: _size(items[i], shared) for i in members}
    order = sorted(members, key=lambda i: (-sizes[i].width, -sizes[i].next_width, i))
    parts = cheapest_parts(
        [sizes[i] for i in order], lambda size: size.fits(shared, tokens, max_length)
    )
    return [Batch(tuple(order[part]), shared) for part in parts]


def cheapest_parts(sizes: Sequence[Size], fits: Callable[[Size], bool]) -> list[slice]:
    """Cut a sequence into passes that fit and cost least together, padding and passes weighed.

    fits: of all that one pass takes; it must stay false when more is added. A size that does not
    fit by itself is a pass of its own.
    """
    least, ends = [0] * (len(sizes) + 1), [0] * len(sizes)
    for start in reversed(range(len(sizes))):
        total, best = sizes[start], None
        for end in range(start + 1, len(sizes) + 1):
            if best is None or total.cost + least[end] < best:
                best, ends[start] = total.cost + least[end], end
            if end == len(sizes):
                break
            total = total.with_(sizes[end])
            if not fits(total):
                break
        least[start] = best
    parts, start = [], 0
    while start < len(sizes):
        parts.append(slice(start, ends[start]))
        start = ends[start]
    return parts


def _size(item: EncodedItem, shared: int) -> Size:
    groups = grouped(item)
    widths = [len(c) - shared + (len(n[0]) - 1 if len(n) == 1 else 0) for c, n in groups]
    following = [len(n) - 1 for _, names in groups if len(names) > 1 for n in names if len(n) > 1]
    return Size(len(groups), max(widths), len(following), max(following, default=0))


def grouped(
    item: EncodedItem,
) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """(context, its continuations), contexts in the order in which they first appear."""
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
    for context, continuation in item.pairs:
        groups[context].append(continuation)
    return list(groups.items())
