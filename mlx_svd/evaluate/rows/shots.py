"""Which examples stand before a question, drawn as lm-eval draws them."""

import random
from collections.abc import Sequence

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.rows.read import Row


def draw_shots(
    rows: Sequence[Row], pool: Sequence[Row], count: int, seed: int, *, own: bool
) -> list[list[Row]]:
    """``count`` examples for each row, in the order in which they are shown.

    One generator serves all rows in their order, as in lm-eval, so the same seed draws the same
    examples there. own: the pool is the rows themselves; then a row is never its own example.
    Raises MlxSvdError if the pool is too small.
    """
    if count == 0:
        return [[] for _ in rows]
    generator = random.Random(seed)
    needed = count + 1 if own else count
    if len(pool) < needed:
        raise MlxSvdError(
            f"{rows[0].where}: {count} examples were asked for, but there are {len(pool)} rows to "
            "draw them from; give a smaller --num-fewshot"
        )
    return [_drawn(row, pool, count, generator, own) for row in rows]


def _drawn(
    row: Row, pool: Sequence[Row], count: int, generator: random.Random, own: bool
) -> list[Row]:
    if not own:
        return generator.sample(pool, count)
    drawn = [x for x in generator.sample(pool, count + 1) if not x.same_content(row)][:count]
    if len(drawn) == count:
        return drawn
    # Several copies of the row were drawn.
    return generator.sample([x for x in pool if not x.same_content(row)], count)


def first_shots(rows: Sequence[Row], pool: Sequence[Row], count: int) -> list[list[Row]]:
    """The first ``count`` rows of the pool with each row's subject (MMLU).

    Raises MlxSvdError naming a subject that has fewer.
    """
    by_subject: dict[str, list[Row]] = {}
    for shot in pool:
        by_subject.setdefault(shot.subject, []).append(shot)
    for row in rows:
        if len(by_subject.get(row.subject, ())) < count:
            raise MlxSvdError(
                f"{row.where}: {count} examples were asked for, but its subject {row.subject!r} "
                f"has {len(by_subject.get(row.subject, ()))}; give a smaller --num-fewshot"
            )
    return [by_subject[row.subject][:count] if count else [] for row in rows]
