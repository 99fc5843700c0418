"""Which numbers of a task's rows are compared, and which direction is good."""

import math
from pathlib import Path

import pytest

from mlx_svd.evaluate.comparison.sample_metrics import Metric, row_metrics
from mlx_svd.evaluate.comparison.samples import Run


def metrics(rows, **results):
    return row_metrics(Run(Path("x"), {"t": rows}, results), "t")


def test_the_rows_own_list_decides_and_results_say_the_direction():
    rows = [{"id": "a", "metrics": ["acc", "bypass", "toxic"], "acc": 1, "toxic": 0.2, "mc2": 1}]
    found, skipped = metrics(rows, higher_is_better={"t": {"acc": True, "toxic": False}})
    assert found == [Metric("acc", "acc", None, True), Metric("toxic", "toxic", None, False)]
    assert skipped == []


def test_without_a_list_known_and_declared_names_are_taken_and_nothing_else():
    rows = [{"doc_id": 3, "target": 1, "kl": 0.1, "own": 2.0, "truncated": 5}]
    found, _ = metrics(rows, higher_is_better={"t": {"own": True}})
    assert [(m.name, m.better) for m in found] == [("kl", False), ("own", True)]


def test_a_metric_of_unknown_direction_has_none():
    found, _ = metrics([{"id": "a", "metrics": ["novel"], "novel": 1.0}])
    assert found == [Metric("novel", "novel", None, None)]


def test_what_is_no_number_per_item_is_named():
    found, skipped = metrics([{"id": "a", "metrics": ["f1", "mcc"], "f1": [1, 0], "mcc": [0, 0]}])
    assert (found, skipped) == ([], ["f1", "mcc"])


def test_log_likelihoods_become_losses_per_token_and_byte():
    rows = [{"id": "a", "loglikelihood": -6.0, "num_tokens": 3, "num_bytes": 12}]
    found, _ = metrics(rows)
    assert [(m.name, m.weight, m.better) for m in found] == [
        ("nats/token", "num_tokens", False), ("bits/byte", "num_bytes", False),
    ]  # fmt: skip
    assert rows[0]["nats/token"] == 6.0
    assert rows[0]["bits/byte"] == pytest.approx(6 / math.log(2))


def test_generated_token_ids_are_no_count_of_tokens():
    found, _ = metrics([{"id": "a", "loglikelihood": -6.0, "tokens": [1, 2, 3]}])
    assert found == []


def test_lm_evals_perplexities_become_losses():
    names = ["word_perplexity", "byte_perplexity", "bits_per_byte"]
    row = {"doc_id": 0, "metrics": names, **{name: [-6.0, 12] for name in names}}
    lambada = {"doc_id": 0, "metrics": ["perplexity", "acc"], "perplexity": -2.5, "acc": 0}
    assert [m.name for m in metrics([row])[0]] == ["nats/word", "bits/byte"]
    assert row["nats/word"] == 6.0
    assert row["bits/byte"] == pytest.approx(6 / math.log(2))
    found, _ = metrics([lambada], higher_is_better={"t": {"perplexity": False, "acc": True}})
    assert [(m.name, m.better) for m in found] == [("nats/item", False), ("acc", True)]
    assert lambada["nats/item"] == 2.5
