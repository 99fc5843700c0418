"""Shares are counts over counts, with Wilson's interval as scipy has it."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from mlx_svd.evaluate.retention import KnowledgeTest, Outcomes, knowledge_summary
from mlx_svd.evaluate.retention.outcomes import Answers

NONE = Answers(np.zeros(0), np.zeros(0), np.zeros(0, dtype=int))


def answers(margins, conflicts, owners=None):
    owners = np.arange(len(margins)) if owners is None else np.array(owners)
    return Answers(np.array(margins, dtype=float), np.array(conflicts, dtype=float), owners)


def case():
    """Three conflict facts, one of them unknown before; four measured ones."""
    groups = np.array(["conflict"] * 3 + ["same_subject"] + ["same_relation"] * 3)
    base = Outcomes(
        answers([1, 1, -1, 2, 2, 2, 2], [-1, -1, 1, -2, -2, -2, -2]),
        answers([1, -1, 1], [-1, -1, -1], [0, 0, 4]),
        answers([1, -1], [-1, 1], [1, 1]),
        ("",) * 7,
        np.array([1, 1, 0, 1, 1, 1, 0], dtype=bool),
        np.zeros(7, dtype=bool),
    )
    after = Outcomes(
        answers([-2, 1, -3, 1, -1, 1, 1], [2, -1, 2, -1, -1, -1, -1]),
        answers([-1, -1, 1], [3, -4, -1], [0, 0, 4]),
        answers([-1, 1], [1, -1], [1, 1]),
        ("",) * 7,
        np.array([0, 1, 0, 1, 0, 1, 1], dtype=bool),
        np.array([1, 0, 0, 0, 0, 0, 0], dtype=bool),
    )
    return KnowledgeTest(None, groups, (), base, None, 7, 6, 0, ""), after


@pytest.mark.parametrize(
    ("key", "count", "n"),
    [
        ("uptake", 2, 3),
        ("uptake_all", 1, 3),
        ("uptake_written", 1, 3),
        ("retained", 3, 4),
        ("retained_same_subject", 1, 1),
        ("retained_same_relation", 2, 3),
        ("retained_conflict", 1, 2),
        ("retained_written", 2, 3),
        ("locality", 0, 1),
    ],
)
def test_shares_and_intervals(key, count, n):
    test, after = case()
    found = knowledge_summary(test, after)[key]
    low, high = binomtest(count, n).proportion_ci(method="wilson")
    assert found["value"] == pytest.approx(count / n)
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert found["n"] == n


def test_paraphrases_of_one_fact_are_one_item():
    test, after = case()
    found = knowledge_summary(test, after)
    assert found["paraphrase_uptake"]["value"] == 0.5
    assert (found["paraphrase_uptake"]["n"], found["paraphrase_uptake"]["rows"]) == (1, 2)
    assert found["paraphrase_retained"]["value"] == 1
    assert found["margin_change"]["value"] == pytest.approx(np.mean([-1, -3, -1, -1]))


def test_what_was_not_measured_is_said():
    test, after = case()
    test = replace(test, base=replace(test.base, paraphrases=NONE, locality=NONE))
    after = replace(after, paraphrases=NONE, locality=NONE, texts=None)
    found = knowledge_summary(test, after)
    for key in ("paraphrase_uptake", "paraphrase_retained", "locality", "uptake_written",
                "retained_elsewhere"):  # fmt: skip
        assert set(found[key]) == {"not_measured"}
