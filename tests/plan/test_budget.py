"""The choice within a number of bytes against brute force, and budgets as users write them."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.budget import Budget, choose, parse_budget
from mlx_svd.plan.candidates import Candidate

seeds = st.integers(0, 2**32 - 1)


def candidate(nbytes: int, loss: float) -> Candidate:
    return Candidate("dense", None, None, None, int(nbytes), float(loss))


def instance(seed: int) -> dict[str, list[Candidate]]:
    """Two to five projections of very different size and sensitivity, with useless candidates."""
    rng = np.random.default_rng(seed)
    made = {}
    for index in range(rng.integers(2, 6)):
        count = rng.integers(2, 7)
        sizes = rng.integers(1, 1000, count) * 10 ** rng.integers(0, 3)
        losses = 10.0 ** rng.uniform(-4, 2) * rng.uniform(0.5, 1.5, count) / sizes
        made[f"layer.{index}"] = [candidate(*pair) for pair in zip(sizes, losses, strict=True)]
    return made


def totals(chosen) -> tuple[int, float]:
    return sum(c.nbytes for c in chosen), sum(c.loss for c in chosen)


def brute_force(candidates, limit: int) -> float:
    """The smallest loss of all combinations that fit."""
    every = (totals(combination) for combination in product(*candidates.values()))
    return min(loss for size, loss in every if size <= limit)


def hull(options: list[Candidate]) -> list[Candidate]:
    """The lower convex hull of (bytes, loss) from the smallest candidate to the least loss."""
    kept: list[Candidate] = []
    for c in sorted(options, key=lambda c: (c.nbytes, c.loss)):
        if kept and c.loss >= kept[-1].loss:
            continue
        if kept and c.nbytes == kept[-1].nbytes:
            kept.pop()
        while len(kept) > 1 and slope(kept[-2], kept[-1]) >= slope(kept[-1], c):
            kept.pop()
        kept.append(c)
    return kept


def slope(a: Candidate, b: Candidate) -> float:
    return (b.loss - a.loss) / (b.nbytes - a.nbytes)


@settings(deadline=None, max_examples=80)
@given(seeds, st.floats(0, 1))
def test_the_choice_fits_and_is_within_one_step_of_the_hull_of_the_optimum(seed, share):
    candidates = instance(seed)
    smallest = sum(min(c.nbytes for c in options) for options in candidates.values())
    largest = sum(max(c.nbytes for c in options) for options in candidates.values())
    limit = int(smallest + share * (largest - smallest))
    chosen = choose(candidates, limit)
    assert chosen.keys() == candidates.keys()
    assert all(chosen[path] in options for path, options in candidates.items())
    size, loss = totals(chosen.values())
    assert size <= limit
    optimum = brute_force(candidates, limit)
    gap = max(
        (a.loss - b.loss for options in candidates.values() for a, b in pairwise(hull(options))),
        default=0.0,
    )
    assert optimum * (1 - 1e-9) <= loss <= (optimum + gap) * (1 + 1e-9)


@settings(deadline=None, max_examples=60)
@given(seeds, st.floats(-9, 3))
def test_the_choice_is_the_optimum_where_the_hulls_reach_the_limit(seed, exponent):
    candidates = instance(seed)
    price = 10.0**exponent
    best = [min(o, key=lambda c: c.loss + price * c.nbytes) for o in candidates.values()]
    limit, _ = totals(best)
    loss = totals(choose(candidates, limit).values())[1]
    assert loss == pytest.approx(brute_force(candidates, limit), rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_more_than_enough_bytes_give_the_least_loss_of_every_projection(seed):
    candidates = instance(seed)
    for path, c in choose(candidates, 10**9).items():
        assert c.loss == min(other.loss for other in candidates[path])


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_the_smallest_size_is_reached_and_said_when_it_is_not(seed):
    candidates = instance(seed)
    smallest = sum(min(c.nbytes for c in options) for options in candidates.values())
    assert totals(choose(candidates, smallest).values())[0] == smallest
    with pytest.raises(MlxSvdError, match=f"--keep-bytes 0.1: .*below the {smallest:,} that can"):
        choose(candidates, smallest - 1, "--keep-bytes 0.1")


def test_equal_losses_do_not_hide_the_smallest_sizes():
    same = [candidate(100, 0.5), candidate(10, 0.5), candidate(50, 0.5)]
    chosen = choose({"a": same, "b": [candidate(8, 0), candidate(4, 0)]}, 14)
    assert [c.nbytes for c in chosen.values()] == [10, 4]


def test_what_is_left_over_is_spent_where_it_gains_most():
    """The hull of b jumps over its middle candidate, which fits into what a leaves."""
    candidates = {
        "a": [candidate(10, 10), candidate(20, 0)],
        "b": [candidate(10, 5), candidate(15, 4.5), candidate(30, 0)],
    }
    chosen = choose(candidates, 36)
    assert [c.nbytes for c in chosen.values()] == [20, 15]


@pytest.mark.parametrize(
    ("written", "expected"),
    [("3.2GB", 3_200_000_000), ("800MB", 800_000_000), ("1.5K", 1500), ("2T", 2 * 10**12),
     (" 12 kB ", 12_000), ("1234567", 1234567), (1234567, 1234567), ("0.5G", 500_000_000),
     ("100B", 100)],
)  # fmt: skip
def test_sizes_are_decimal_bytes(written, expected):
    assert parse_budget(target_size=written) == Budget(target_size=expected)


@pytest.mark.parametrize(
    "written", ["", "GB", "3GiB", "3,2GB", "1.2.3MB", "-5MB", "all", ".", True]
)
def test_sizes_that_are_none_are_said(written):
    with pytest.raises(MlxSvdError, match=r"--target-size .*give bytes, or 800MB, 3\.2GB"):
        parse_budget(target_size=written)


def test_contradictory_and_missing_limits_are_said():
    with pytest.raises(MlxSvdError, match="--keep-bytes and --target-size: contradictory limits"):
        parse_budget(keep_bytes=0.5, target_size="3GB")
    with pytest.raises(MlxSvdError, match="--target-size and --target-bpw: contradictory"):
        parse_budget(target_size="3GB", target_bpw=4.5)
    with pytest.raises(MlxSvdError, match="a budget needs --keep-bytes, --target-size or"):
        parse_budget()


@pytest.mark.parametrize("given", [{"keep_bytes": 0}, {"keep_bytes": -0.5}, {"target_size": "0GB"},
                                   {"target_bpw": 0.0}])  # fmt: skip
def test_limits_are_above_zero(given):
    with pytest.raises(MlxSvdError, match="must be above 0"):
        parse_budget(**given)


@pytest.mark.parametrize("value", ["0.5", True, [0.5], float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["keep_bytes", "target_bpw"])
def test_limits_are_numbers(name, value):
    with pytest.raises(MlxSvdError, match=f"{name}: .*is not a number"):
        parse_budget(**{name: value})
