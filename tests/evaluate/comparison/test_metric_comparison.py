"""Verdicts follow from the numbers beside them."""

import numpy as np
import pytest

from mlx_svd.evaluate.comparison.metric_comparison import compare_metric, judged
from mlx_svd.evaluate.statistics.intervals import wilson
from mlx_svd.evaluate.statistics.paired import equivalence, holm, mcnemar
from mlx_svd.evaluate.statistics.pairing import Paired
from mlx_svd.evaluate.statistics.power import detectable_share_difference
from tests.evaluate.result_folders import flipped


def shares(n, lost, gained):
    a, b = flipped(n, lost, gained)
    return Paired("acc", tuple(map(str, range(n))), a, b, np.ones(n), 0)


def verdict(pair, more_is_better=True, margin=0.01, others=0):
    rows = [compare_metric("t", pair, more_is_better, margin)]
    rows += [compare_metric("t", shares(50, 3, 3), True, margin)] * others
    return judged(rows)[0].verdict


def test_a_line_holds_scores_flips_test_equivalence_and_power():
    pair = shares(400, 12, 4)
    row = judged([compare_metric("t", pair, True, 0.05, chance=0.6)])[0]
    assert row.verdict == "chance"
    assert (row.a.low, row.a.high) == wilson(240, 400)
    assert row.difference.value == pytest.approx(-8 / 400)
    assert (row.flips.lost, row.flips.gained) == (12, 4)
    assert row.difference.p == row.p_holm == mcnemar(12, 4)
    assert row.equivalence == equivalence(pair.sums_a, pair.sums_b, pair.counts, 0.05)
    assert row.detects == detectable_share_difference(400, 16 / 400)
    assert (row.mark_a, row.mark_b) == ("chance", "chance")


@pytest.mark.parametrize(
    ("flips", "expected"),
    [
        ((2000, 0, 0), "equivalent"),
        ((2000, 100, 20), "worse"),
        ((2000, 20, 100), "better"),
        ((2000, 45, 60), "no degradation"),
        ((200, 6, 4), "not shown"),
        ((50, 0, 0), "not shown"),
    ],
)
def test_verdict_of_right_and_wrong(flips, expected):
    assert verdict(shares(*flips)) == expected


def test_no_degradation_is_about_the_bad_direction_only():
    better_or_equal, worse_or_equal = shares(2000, 45, 60), shares(2000, 60, 45)
    assert verdict(better_or_equal) == "no degradation"
    assert verdict(worse_or_equal) == "not shown"
    assert verdict(better_or_equal, more_is_better=False) == "not shown"
    assert verdict(worse_or_equal, more_is_better=False) == "no degradation"


def test_less_is_better_turns_the_verdict_but_not_the_difference():
    for more, expected in ((True, "worse"), (False, "better")):
        row = judged([compare_metric("t", shares(2000, 100, 20), more, 0.01)])[0]
        assert row.verdict == expected
        assert row.difference.value == pytest.approx(-0.04)
        assert row.equivalence.low < -0.04 < row.equivalence.high


def test_a_difference_must_survive_the_correction_for_many_lines():
    pair = shares(400, 18, 6)
    assert 0.02 < mcnemar(18, 6) < 0.05
    assert verdict(pair) == "worse"
    assert verdict(pair, others=4) == "not shown"


def test_lines_without_a_good_direction_get_no_verdict_and_cost_no_correction():
    pair = shares(400, 18, 6)
    lines = [compare_metric("t", pair, more, 0.01) for more in (True, None, True)]
    first, neutral, last = judged(lines)
    assert (neutral.verdict, neutral.p_holm, neutral.equivalence) == ("", None, None)
    assert [first.p_holm, last.p_holm] == holm([mcnemar(18, 6)] * 2)


def test_models_at_chance_have_nothing_to_lose_so_nothing_is_claimed():
    for flips in ((2000, 0, 0), (2000, 45, 60), (400, 12, 4)):
        for chance, expected in ((0.6, "chance"), (0.25, verdict(shares(*flips)))):
            row = judged([compare_metric("t", shares(*flips), True, 0.01, chance)])[0]
            assert row.verdict == expected
    fallen = compare_metric("t", shares(2000, 300, 0), True, 0.01, chance=0.45)
    assert (fallen.mark_a, fallen.mark_b) == ("", "chance")
    assert judged([fallen])[0].verdict == "worse"


def test_chance_marks_say_below_chance_too():
    row = compare_metric("t", shares(400, 200, 0), True, 0.01, chance=0.5)
    assert (row.mark_a, row.mark_b) == ("", "below chance")
