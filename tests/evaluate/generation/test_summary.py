"""Numbers of generated texts, alone and paired with a base model's."""

import numpy as np
import pytest

from mlx_svd.evaluate.generation.repetition import distinct
from mlx_svd.evaluate.generation.summary import generation_differences, generation_summary
from tests.evaluate.result_folders import text_record, texts


def test_texts_too_short_for_a_metric_are_left_out_of_it_not_counted_as_good():
    records = [text_record(0, [1, 1, 1, 1]), text_record(1, []), text_record(2, [5])]
    summary = generation_summary(records)
    assert (summary["rep_2,greedy"].value, summary["rep_2,greedy"].n) == (pytest.approx(2 / 3), 1)
    assert summary["length,greedy"].value == pytest.approx(5 / 3)
    assert "rep_2,greedy" not in generation_summary(records[1:])
    assert "distinct_2,greedy" not in generation_summary(records[1:])


def test_intervals_of_shares_stay_between_zero_and_one():
    records = [text_record(0, [1, 1, 1, 1]), *(text_record(i, [i, i + 1, 9]) for i in (1, 2, 3))]
    summary = generation_summary(records)
    assert 0 == summary["rep_2,greedy"].low < summary["rep_2,greedy"].value
    often = [text_record(0, [1, 2, 3, 4]), *(text_record(i, [i] * 9) for i in (1, 2, 3))]
    assert generation_summary(often)["rep_2,greedy"].high == 1
    assert summary["length,greedy"].high > 1


def test_differences_are_paired_by_prompt():
    base, model = texts(20), texts(50)
    found = generation_differences(base, model[::-1])
    assert found["loop,greedy"].value == pytest.approx(0.15)
    assert found["loop,greedy"].test == "McNemar"
    assert found["rep_3,greedy"].value == pytest.approx(
        np.mean([m["rep_3"] - b["rep_3"] for b, m in zip(base, model, strict=True)])
    )
    values = [distinct([r["tokens"] for r in rows], 2).value for rows in (base, model)]
    assert found["distinct_2,greedy"].value == pytest.approx(values[1] - values[0])
    assert found["distinct_2,greedy"].high < 0
    assert found["distinct_2,greedy"].method == "jackknife"
