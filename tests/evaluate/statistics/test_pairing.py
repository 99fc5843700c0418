"""The same items of two runs, in the same order, or a refusal that names what differs."""

import math

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.statistics.pairing import check_same_items, pair_metric


def row(item, acc, **more):
    return {"id": item, "acc": acc, **more}


A = [row("x", 1), row("y", 0), row("z", 1)]
B = [row("z", 0), row("x", 1), row("y", 1)]


def pair(a, b, metric="acc", **options):
    return pair_metric("piqa", metric, metric, a, b, **options)


def test_items_are_paired_by_id_in_whatever_order_they_were_written():
    check_same_items("piqa", A, B)
    found = pair(A, B)
    assert found.ids == ("x", "y", "z")
    assert found.sums_a.tolist() == [1, 0, 1]
    assert found.sums_b.tolist() == [1, 1, 0]
    assert (found.a, found.b, found.missing) == (pytest.approx(2 / 3), pytest.approx(2 / 3), 0)


def test_rows_of_one_item_are_summed_and_counted():
    a = [row("x", 1, seed=0), row("x", 0, seed=1), row("y", 1, seed=0), row("y", 1, seed=1)]
    b = [dict(r, acc=1 - r["acc"]) for r in reversed(a)]
    check_same_items("facts", a, b)
    found = pair(a, b)
    assert found.counts.tolist() == [2, 2]
    assert found.sums_a.tolist() == [1, 2]
    assert found.sums_b.tolist() == [1, 0]


def test_documents_without_id_are_paired_by_their_number():
    found = pair([{"doc_id": 2, "acc": 1}], [{"doc_id": 2, "acc": 0}])
    assert found.ids == ("2",)


def test_weights_make_the_mean_one_per_token():
    a = [{"id": "x", "nats": 10.0, "tokens": 5}, {"id": "y", "nats": 1.0, "tokens": 1}]
    found = pair(a, a, "nats", weight="tokens")
    assert found.a == pytest.approx(11 / 6)


def test_an_item_without_the_metric_in_one_run_is_left_out_of_both_and_counted():
    found = pair(A, [row("x", None), row("y", 1), row("z", 1)])
    assert (found.ids, found.missing) == (("y", "z"), 1)
    assert pair(A, B, "f1") is None


@pytest.mark.parametrize(
    ("b", "words"),
    [
        (B[:2], "1 only in A, 0 only in B, the first is 'y'"),
        ([*B, row("w", 1)], "0 only in A, 1 only in B, the first is 'w'"),
        ([*B, B[0]], "item 'z' has 1 rows in A and 2 in B"),
    ],
)
def test_other_items_are_refused_and_the_first_is_named(b, words):
    with pytest.raises(MlxSvdError, match=f"piqa: .*{words}"):
        check_same_items("piqa", A, b)


@pytest.mark.parametrize(
    "name", ["doc_hash", "prompt_hash", "target_hash", "prompt", "seed", "settings"]
)
def test_the_same_id_with_another_question_or_settings_is_refused(name):
    a, b = [row("x", 1, **{name: 1})], [row("x", 1, **{name: 2})]
    with pytest.raises(MlxSvdError, match=f"'x' is not the same question in both: {name} differs"):
        check_same_items("piqa", a, b)


@pytest.mark.parametrize("value", [math.nan, math.inf, "right", [1]])
def test_a_metric_that_is_no_finite_number_names_the_item(value):
    with pytest.raises(MlxSvdError, match="piqa: item 'y': acc is"):
        pair(A, [row("x", 1), row("y", value), row("z", 1)])


def test_other_numbers_of_tokens_are_refused():
    a, b = ([{"id": "x", "nats": 1.0, "tokens": n}] for n in (5, 6))
    with pytest.raises(MlxSvdError, match="item 'x' has 5 tokens in A and 6 in B"):
        pair(a, b, "nats", weight="tokens")
    empty = [{"id": "x", "nats": 0.0, "tokens": 0}]
    with pytest.raises(MlxSvdError, match="item 'x' has 0 tokens"):
        pair(empty, empty, "nats", weight="tokens")
