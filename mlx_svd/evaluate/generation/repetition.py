"""How much a text repeats itself, counted on its token ids.

rep-n: Welleck et al., Neural text generation with unlikelihood training (2019). distinct-n: Li et
al., A diversity-promoting objective function (2016). Loops: Holtzman et al., The curious case of
neural text degeneration (2020).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_svd.errors import MlxSvdError

# A text loops if its end is this often the same phrase of at least so many tokens.
LOOP_TIMES, LOOP_TOKENS = 3, 2


def repetition(tokens: Sequence[int], n: int) -> float | None:
    """rep-n of one text: 1 - different n-grams / n-grams, 0 (nothing twice) to almost 1. None for
    fewer than n tokens: a text that ended at once has not shown that it does not repeat."""
    total = len(tokens) - n + 1
    if total < 1:
        return None
    return 1 - len(set(_ngrams(tokens, n))) / total


def loops(tokens: Sequence[int]) -> bool:
    """Whether the text got stuck: it ends with one phrase of 2 tokens or more, three times in a
    row, whatever came before.

    Where generation stopped within the phrase makes no difference, and one token repeated counts
    from six times on. What varies in each round (a counter, a name) is no loop by this rule; rep-n
    shows it.
    """
    ids = np.asarray(tokens)
    for period in range(LOOP_TOKENS, len(ids) // LOOP_TIMES + 1):
        end = ids[len(ids) - LOOP_TIMES * period :]
        if np.array_equal(end[period:], end[:-period]):
            return True
    return False


@dataclass(frozen=True)
class Distinct:
    """value: different n-grams / n-grams over all texts together; parts (N,): jackknife
    pseudo-values of the N items in sorted order, which vary from item to item as much as ``value``
    depends on each; the error that they give is rather too large than too small (Efron and Stein,
    Annals of Statistics 9, 1981)."""

    value: float
    parts: np.ndarray


def distinct(
    texts: Sequence[Sequence[int]], n: int, items: Sequence[str] | None = None
) -> Distinct:
    """distinct-n of all texts together: low also if a model says the same after every prompt,
    which rep-n of each text cannot show.

    items: the prompt of each text, if prompts gave several; by default each text is an item.
    Depends on the total length: compare runs whose texts are about equally long. Raises
    MlxSvdError if no text has n tokens.
    """
    counts: dict[str | int, Counter] = {}
    together: Counter = Counter()
    for number, text in enumerate(texts):
        ngrams = list(_ngrams(text, n))
        together.update(ngrams)
        counts.setdefault(number if items is None else items[number], Counter()).update(ngrams)
    total, different = together.total(), len(together)
    if not total:
        raise MlxSvdError(
            f"distinct-{n}: none of {len(texts)} texts has {n} tokens; the model ends its text at "
            "once, or --max-tokens is too small"
        )
    ordered = [counts[item] for item in sorted(counts)]
    # Without one item those n-grams are gone that no other item has.
    own = np.array([sum(together[g] == k for g, k in count.items()) for count in ordered])
    left = total - np.array([count.total() for count in ordered])
    value, size = different / total, len(ordered)
    without = np.where(left > 0, (different - own) / np.maximum(left, 1), value)
    return Distinct(value, size * value - (size - 1) * without)


def _ngrams(tokens: Sequence[int], n: int) -> Iterator[tuple[int, ...]]:
    return zip(*(tokens[i:] for i in range(n)), strict=False)
