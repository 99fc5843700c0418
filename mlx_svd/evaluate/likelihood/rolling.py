"""A long text in windows, each token predicted once, as lm-eval's rolling log-likelihood."""

from collections.abc import Sequence

from mlx_svd.evaluate.likelihood.encode import EncodedItem


def rolling_items(
    name: str, tokens: Sequence[int], first: int, max_length: int
) -> list[EncodedItem]:
    """Windows of ``max_length`` tokens as (context, continuation).

    ``first``, the tokenizer's first token, stands before the text. Every window but the last is
    scored whole after one token of context; the last one gets as much context as fits beside what
    is left to score.
    """
    text = [first, *tokens]
    items = []
    for start in range(0, len(tokens), max_length):
        end = min(start + max_length, len(tokens))
        begin = start if end - start == max_length or not start else end - max_length
        pair = (tuple(text[begin : start + 1]), tuple(text[start + 1 : end + 1]))
        items.append(EncodedItem(f"{name}: window {len(items)}", (pair,), 0))
    return items
