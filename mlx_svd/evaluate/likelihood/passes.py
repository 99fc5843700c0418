"""The rows of tokens that score some items: prompts first, then what goes on from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_svd.evaluate.likelihood.batches import Size, cheapest_parts, grouped
from mlx_svd.evaluate.likelihood.encode import EncodedItem


@dataclass
class Row:
    """tokens: of one row; prompt: the prompt that it goes on from, or its own number; wanted:
    (position of the hidden state that predicts it, token, number of the pair that it belongs to)
    of every token to score."""

    tokens: tuple[int, ...]
    prompt: int
    wanted: list[tuple[int, int, int]] = field(default_factory=list)

    def want(self, position: int, tokens: Sequence[int], owner: int) -> None:
        """Score tokens that follow each other, the first predicted at ``position``."""
        self.wanted += [(position + k, token, owner) for k, token in enumerate(tokens)]


def passes(items: Sequence[EncodedItem], shared: int) -> tuple[list[Row], list[Row]]:
    """(prompts without their first ``shared`` tokens, continuations of two or more tokens).

    A prompt with one continuation is one row together with it. Pairs are numbered through all
    items.
    """
    prompts: list[Row] = []
    following: list[Row] = []
    first = 0
    for item in items:
        numbers: dict[tuple[int, ...], list[int]] = {}
        for owner, (context, _) in enumerate(item.pairs, first):
            numbers.setdefault(context, []).append(owner)
        for context, continuations in grouped(item):
            tokens, row = context[shared:], len(prompts)
            alone = continuations[0][:-1] if len(continuations) == 1 else ()
            prompts.append(Row(tokens + alone, row))
            for owner, continuation in zip(numbers[context], continuations, strict=True):
                if len(continuations) == 1:
                    prompts[row].want(len(tokens) - 1, continuation, owner)
                    continue
                prompts[row].want(len(tokens) - 1, continuation[:1], owner)
                if len(continuation) > 1:
                    following.append(Row(continuation[:-1], row))
                    following[-1].want(0, continuation[1:], owner)
        first += len(item.pairs)
    return prompts, following


def of_similar_length(rows: list[Row]) -> list[list[Row]]:
    """Rows, longest first, in the parts that cost least."""
    lengths = sorted({len(row.tokens) for row in rows}, reverse=True)
    same = {length: [row for row in rows if len(row.tokens) == length] for length in lengths}
    sizes = [Size(len(same[length]), length) for length in lengths]
    parts = cheapest_parts(sizes, lambda size: True)
    return [[row for length in lengths[part] for row in same[length]] for part in parts]
