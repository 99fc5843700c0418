"""Cutting a sequence into passes: against every possible cut, and the limits."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from mlx_svd.evaluate.likelihood.batches import Size, cheapest_parts


def total(sizes, part):
    joined = sizes[part][0]
    for size in sizes[part][1:]:
        joined = joined.with_(size)
    return joined


def every_cut(count):
    for number in range(count):
        for inner in combinations(range(1, count), number):
            ends = (0, *inner, count)
            yield [slice(a, b) for a, b in pairwise(ends)]


@pytest.mark.parametrize("seed", range(8))
def test_no_other_cut_that_fits_costs_less(seed):
    rng = np.random.default_rng(seed)
    widths = sorted(rng.integers(1, 120, 9).tolist(), reverse=True)
    sizes = [Size(1, width, *rng.integers(0, 6, 2).tolist()) for width in widths]

    def fits(size):
        return size.rows * size.width <= 300 and size.next_rows <= 12

    parts = cheapest_parts(sizes, fits)
    assert [i for part in parts for i in range(*part.indices(9))] == list(range(9))
    allowed = [
        sum(total(sizes, part).cost for part in cut)
        for cut in every_cut(9)
        if all(part.stop - part.start == 1 or fits(total(sizes, part)) for part in cut)
    ]
    assert sum(total(sizes, part).cost for part in parts) == min(allowed)


def test_what_does_not_fit_by_itself_is_a_pass_of_its_own():
    sizes = [Size(1, 500), Size(1, 400), Size(1, 3), Size(1, 3)]
    parts = cheapest_parts(sizes, lambda size: size.rows * size.width <= 10)
    assert parts == [slice(0, 1), slice(1, 2), slice(2, 4)]


def test_nothing_makes_no_pass():
    assert cheapest_parts([], lambda size: True) == []
