"""Paired comparisons over items and seeds, against scipy and plain sums."""

import numpy as np
import pytest
from scipy import stats

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.statistics.matched_shares import share_difference_interval
from mlx_svd.experiments.matrix.comparisons import compare_runs
from mlx_svd.experiments.matrix.record import EXP, Measured, metric_of

ITEMS = [f"item {i}" for i in range(40)]


def run(values, weights=None, **options) -> Measured:
    share = weights is None
    metric = metric_of(ITEMS[: len(values)], values, weights, share=share, **options)
    return Measured({"m": metric})


def answers(seed, share) -> np.ndarray:
    return (np.random.default_rng(seed).random(40) < share).astype(float)


def test_one_run_each_of_right_and_wrong_is_mcnemars_exact_test():
    a, b = answers(0, 0.8), answers(1, 0.5)
    lost, gained = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    found = compare_runs({None: run(a)}, {None: run(b)}, "m")
    assert found.p == pytest.approx(stats.binomtest(lost, lost + gained, 0.5).pvalue)
    assert found.value == pytest.approx((gained - lost) / 40)
    interval = share_difference_interval(lost, gained, 40)
    assert (found.items_low, found.items_high) == pytest.approx(interval)
    assert found.p_seeds is None
    assert found.test == "McNemar"


def test_over_seeds_it_is_students_paired_t_and_p_is_the_larger_one():
    a = {s: run(answers(s, 0.9)) for s in range(4)}
    b = {s: run(answers(10 + s, 0.4)) for s in range(4)}
    differences = [b[s].metrics["m"].mean - a[s].metrics["m"].mean for s in range(4)]
    found = compare_runs(a, b, "m")
    t = stats.ttest_1samp(differences, 0)
    assert found.p_seeds == pytest.approx(t.pvalue)
    low, high = t.confidence_interval(0.95)
    assert (found.seeds_low, found.seeds_high) == pytest.approx((low, high))
    assert found.p == max(found.p_items, found.p_seeds)
    assert found.seed_values == pytest.approx(differences)
    assert found.value == pytest.approx(np.mean(differences))


def test_items_are_the_units_however_many_seeds_were_run():
    a, b = answers(0, 0.8), answers(1, 0.5)
    once = compare_runs({None: run(a)}, {None: run(b)}, "m")
    often = compare_runs({s: run(a) for s in range(5)}, {s: run(b) for s in range(5)}, "m")
    assert (often.items_low, often.items_high, often.p_items) == (
        once.items_low, once.items_high, once.p_items,
    )  # fmt: skip
    assert often.items == 40


def test_a_run_without_anything_random_pairs_with_every_seed():
    a, b = answers(0, 0.8), {s: run(answers(s, 0.4)) for s in (3, 5)}
    found = compare_runs({None: run(a)}, b, "m")
    assert found.runs == 2
    assert found.value == pytest.approx(
        np.mean([m.metrics["m"].mean for m in b.values()]) - a.mean()
    )


def test_equal_answers_have_an_interval_that_is_not_empty():
    a = answers(0, 0.8)
    found = compare_runs({s: run(a) for s in (0, 1)}, {s: run(a) for s in (0, 1)}, "m")
    assert found.items_low < 0 < found.items_high
    assert (found.seeds_low, found.seeds_high, found.p) == (0, 0, 1)


def test_perplexities_give_a_ratio():
    tokens = np.full(12, 10.0)
    losses = np.random.default_rng(0).normal(20, 2, 12)
    found = compare_runs(
        {None: run(losses, tokens, scale=EXP)}, {None: run(losses + 1, tokens, scale=EXP)}, "m"
    )
    assert found.value == pytest.approx(np.exp(1 / 10))


def test_items_that_only_one_run_has_are_left_out_and_counted():
    found = compare_runs({None: run(answers(0, 0.5))}, {None: run(answers(1, 0.5)[:30])}, "m")
    assert (found.items, found.left_out) == (30, 10)


def test_runs_that_cannot_be_paired_are_refused():
    with pytest.raises(MlxSvdError, match="no seed in common"):
        compare_runs({0: run(answers(0, 0.5))}, {1: run(answers(0, 0.5))}, "m")
    with pytest.raises(MlxSvdError, match="tokenizer"):
        compare_runs({0: run([1.0], [10])}, {0: run([1.0], [11])}, "m")
