"""Two result folders, compared item by item or refused for what differs."""

import csv
import io
import json
import math

import numpy as np
import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.comparison.compare import compare
from mlx_svd.evaluate.comparison.table import (
    HEAD,
    csv_text,
    json_text,
    markdown,
    remarks,
    table_rows,
    write_comparison,
)
from mlx_svd.evaluate.perplexity import WindowLosses, ratio
from mlx_svd.evaluate.statistics.paired import holm, mcnemar
from tests.evaluate.result_folders import (
    answers,
    flipped,
    losses,
    texts,
    write_lm_eval_run,
    write_run,
)

CHANCE = {"piqa": {"acc": {"low": 0.4, "high": 0.6, "n": 1, "chance": 0.5, "at_chance": True}}}


@pytest.fixture
def folders(tmp_path):
    """Two runs of piqa and wikitext."""
    a, b = flipped(500, 20, 12)
    return (
        write_run(tmp_path / "a", {"piqa": answers(a), "wikitext": losses()}, intervals=CHANCE),
        write_run(tmp_path / "b", {"piqa": answers(b)[::-1], "wikitext": losses(0.02)}),
    )


def line(comparison, metric):
    return next(row for row in comparison.rows if row.metric == metric)


def test_shares_are_paired_by_id_whatever_the_order_of_the_rows(folders):
    row = line(compare(*folders), "acc")
    assert (row.flips.lost, row.flips.gained, row.difference.n) == (20, 12, 500)
    assert row.difference.value == pytest.approx(-8 / 500)
    assert row.difference.p == mcnemar(20, 12)
    assert (row.mark_a, row.mark_b) == ("", "")


def test_perplexities_are_compared_per_token_and_per_byte(folders):
    found = compare(*folders)
    sums = [np.array([-r["loglikelihood"] for r in losses(s)]) for s in (0.0, 0.02)]
    counts = np.full(40, 100)
    expected = ratio(*(WindowLosses(s, counts) for s in sums[::-1]))
    tokens, per_byte = line(found, "nats/token"), line(found, "bits/byte")
    assert math.exp(tokens.difference.value) == pytest.approx(expected.ratio)
    assert math.exp(tokens.difference.low) == pytest.approx(expected.low, abs=1e-3)
    assert math.exp(tokens.difference.high) == pytest.approx(expected.high, abs=1e-3)
    assert per_byte.a.value == pytest.approx(tokens.a.value / 4 / math.log(2))
    assert tokens.verdict == "worse"


def test_another_tokenizer_leaves_bits_per_byte(tmp_path):
    b = [{**row, "num_tokens": 90} for row in losses()]
    a, b = (write_run(tmp_path / n, {"text": r}) for n, r in (("a", losses()), ("b", b)))
    found = compare(a, b)
    assert [row.metric for row in found.rows] == ["bits/byte"]
    assert "text: nats/token not compared: the models tokenize differently" in found.notes


def test_chance_is_marked_where_the_results_give_it(tmp_path):
    a, b = flipped(100, 5, 5, right=0.5)
    a, b = (write_run(tmp_path / n, {"piqa": answers(r)}, intervals=CHANCE)
            for n, r in (("a", a), ("b", b)))  # fmt: skip
    assert line(compare(a, b), "acc").mark_a == "chance"
    assert " chance |" in markdown(compare(a, b))
    said = remarks(compare(a, b))[0]
    assert said.startswith("neither model is shown to be above chance")
    assert "piqa, acc: detects differences above" in said
    assert "with n = 100" in said


def test_too_few_items_are_said_plainly_with_what_they_detect(folders):
    found = compare(*folders)
    row = line(found, "acc")
    assert row.verdict == "not shown"
    (text,) = [remark for remark in remarks(found) if remark.startswith("n too small for these")]
    assert "piqa, acc: detects differences above 0.03" in text
    assert f"with n = {row.difference.n}, takes about {row.needed:,}" in text


def test_tasks_of_one_run_only_are_named_not_dropped_silently(tmp_path, folders):
    c = write_run(tmp_path / "c", {"piqa": answers(np.ones(500)), "mmlu": answers([1], "mmlu")})
    notes = compare(folders[0], c).notes
    assert notes == [
        "not compared, only in A: wikitext",
        "not compared, only in B: mmlu",
    ]


def test_metrics_that_compare_with_a_base_are_no_metrics_of_one_run(tmp_path):
    a = write_run(tmp_path / "a", {"piqa": TEN})
    b = write_run(tmp_path / "b", {"piqa": [{**row, "flip": 0, "retained": 1} for row in TEN]})
    assert compare(a, b).notes == []


def test_metrics_of_one_run_and_items_without_a_value_are_named(tmp_path):
    more = [{**row, "acc_norm": 1, "mc2": None if i else 0.5} for i, row in enumerate(TEN)]
    nothing = [{**row, "mc2": None, "f1": None} for row in TEN]
    some = [{**row, "mc2": 0.25} for row in TEN]
    a, b, c = (
        write_run(tmp_path / name, {"piqa": rows})
        for name, rows in (("a", more), ("b", nothing), ("c", some))
    )
    assert compare(a, b).notes == ["piqa: not compared, only in one run: acc_norm, mc2"]
    found = compare(a, c)
    assert found.notes == [
        "piqa: not compared, only in one run: acc_norm",
        "piqa: mc2: items left out, without a value: 9",
    ]
    assert (line(found, "mc2").missing, line(found, "mc2").difference.n) == (9, 1)


def test_chosen_metrics_alone_are_corrected_for(folders):
    found = compare(*folders, metrics=["acc"])
    assert [row.metric for row in found.rows] == ["acc"]
    assert found.rows[0].p_holm == found.rows[0].difference.p
    everything = compare(*folders).rows
    assert [r.p_holm for r in everything] == holm([r.difference.p for r in everything])
    assert line(compare(*folders, metrics=["nats/token"]), "nats/token").p_holm == (
        line(compare(*folders), "nats/token").p_holm / 3
    )


def test_folders_of_lm_eval_are_compared(tmp_path):
    a, b = flipped(300, 30, 10)
    a = write_lm_eval_run(tmp_path / "a", a, [-3.0, -4.0, -5.0])
    b = write_lm_eval_run(tmp_path / "b", b, [-3.3, -4.5, -5.2])
    found = compare(a, b)
    assert [(r.task, r.metric) for r in found.rows] == [
        ("my_piqa", "acc"), ("my_piqa", "acc_norm"),
        ("mytext", "nats/word"), ("mytext", "bits/byte"),
    ]  # fmt: skip
    assert line(found, "acc").difference.p == mcnemar(30, 10)
    assert line(found, "nats/word").a.value == pytest.approx(12 / 30)
    assert line(found, "bits/byte").a.value == pytest.approx(12 / 138 / math.log(2))
    assert line(found, "bits/byte").more_is_better is False


def test_several_answers_by_filter_are_lines_of_their_own_and_metrics_without_numbers_are_named(
    tmp_path,
):
    rows = [
        {"doc_id": i, "filter": kind, "metrics": ["exact_match", "f1"], "f1": [1, 0],
         "exact_match": float(i % 2)}
        for i in range(40) for kind in ("strict", "flexible")
    ]  # fmt: skip
    a, b = (write_run(tmp_path / name, {"gsm8k": rows}) for name in "ab")
    found = compare(a, b)
    assert [row.metric for row in found.rows] == ["exact_match,strict", "exact_match,flexible"]
    assert found.rows[0].difference.n == 40
    assert "gsm8k: not compared, no number per item: f1" in found.notes


def test_generated_texts_get_their_lines_and_the_gate(tmp_path):
    a, b = (write_run(tmp_path / n, {"generation": texts(k)}) for n, k in (("a", 10), ("b", 60)))
    found = compare(a, b)
    assert {row.metric for row in found.rows} == {
        "rep_2", "rep_3", "rep_4", "loop", "length", "ended", "distinct_1,greedy",
        "distinct_2,greedy", "distinct_3,greedy",
    }  # fmt: skip
    assert line(found, "loop").verdict == "worse"
    assert line(found, "distinct_2,greedy").verdict == "worse"
    assert found.gate.verdict == "fail"
    assert "gate: fail" in markdown(found)
    assert compare(a, b, gate_margin=0.5).gate.verdict == "pass"
    assert compare(a, a).gate.verdict == "pass"
    both = compare(a, b, gate_metrics=["loop", "rep_4"]).gate
    assert {check.name for check in both.checks} == {"loop,greedy", "rep_4,greedy"}


def test_markdown_csv_and_json_hold_the_same_numbers(folders, tmp_path):
    found = compare(*folders)
    write_comparison(found, tmp_path / "deep" / "out")
    written = {p.name: p.read_text() for p in (tmp_path / "deep" / "out").iterdir()}
    assert written == {
        "compare.json": json_text(found),
        "compare.md": markdown(found),
        "compare.csv": csv_text(found),
    }
    rows = list(csv.DictReader(io.StringIO(written["compare.csv"])))
    record = json.loads(written["compare.json"])
    for row, entry, cells in zip(rows, record["rows"], table_rows(found), strict=True):
        assert len(cells) == len(HEAD)
        assert "| " + " | ".join(cells) + " |" in written["compare.md"]
        assert float(row["difference"]) == entry["difference"]["value"]
        assert cells[5].startswith(f"{entry['difference']['value']:+.4f} [")
        assert float(row["b_high"]) == entry["b"]["high"]
        assert float(row["tost_p"]) == max(
            entry["equivalence"]["p_low"], entry["equivalence"]["p_high"]
        )
        assert row["verdict"] == entry["verdict"] == cells[10]


def test_one_item_makes_valid_json_and_no_claims(tmp_path):
    a, b = (write_run(tmp_path / n, {"t": losses(s, n=1)}) for n, s in (("a", 0.0), ("b", 0.1)))
    found = compare(a, b)
    assert [row.verdict for row in found.rows] == ["not shown"] * 2
    assert json.loads(json_text(found))["rows"][0]["difference"]["low"] is None
    assert "takes more" in markdown(found)


def test_the_seed_is_that_of_the_bootstrap(folders):
    one, same, other = (line(compare(*folders, seed=s), "nats/token").difference for s in (0, 0, 1))
    assert one == same
    assert one.bootstrap != other.bootstrap


TEN = answers([1] * 10)
CHANGES = {
    "fewer items": ({"piqa": TEN[:9]}, {}, "piqa: .*1 only in A, 0 only in B.*'piqa-9'"),
    "other task": ({"mmlu": TEN}, {}, "no task in common .piqa and mmlu"),
    "other hash": ({}, {"task_hashes": {"piqa": "bbb"}}, "piqa: the data differ: hash aaa .* bbb"),
    "other shots": ({}, {"n-shot": {"piqa": 5}}, "piqa: the number of examples differs: 0 .* 5"),
    "other version": ({}, {"versions": {"piqa": 2}}, "piqa: the version of the task differs"),
    "nan": ({"piqa": [*TEN[:9], {**TEN[9], "acc": math.nan}]}, {}, "'piqa-9': acc is nan"),
    "no metric": ({"piqa": [{"id": r["id"]} for r in TEN]}, {}, "no metric .*evaluate both again"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_runs_that_cannot_be_compared_are_refused_by_what_differs(tmp_path, case):
    tasks, results, words = CHANGES[case]
    conditions = {"task_hashes": {"piqa": "aaa"}, "n-shot": {"piqa": 0}, "versions": {"piqa": 1}}
    rows = {"piqa": TEN}
    a = write_run(tmp_path / "a", rows, **conditions)
    b = write_run(tmp_path / "b", tasks or rows, **{**conditions, **results})
    with pytest.raises(MlxSvdError, match=words) as error:
        compare(a, b)
    assert "\n" not in str(error.value)


def test_examples_drawn_by_another_seed_are_refused_and_without_examples_the_seed_is_free(tmp_path):
    def run(name, shots, seed):
        conditions = {"n-shot": {"piqa": shots}, "config": {"fewshot_seed": seed}}
        return write_run(tmp_path / name, {"piqa": TEN}, **conditions)

    with pytest.raises(MlxSvdError, match="piqa: the seed of the examples differs: 1 in A, 2 in B"):
        compare(run("a", 5, 1), run("b", 5, 2))
    assert compare(run("c", 0, 1), run("d", 0, 2)).notes == []


def test_every_task_is_held_to_the_settings_of_its_own_run(tmp_path):
    rows = {"piqa": answers([1, 0, 1]), "arc_easy": answers([0, 1, 1], "arc_easy")}

    def folder(name, last, seed, own=None):
        settings = {task: {"seed": seed, "context": 1024} for task in rows}
        settings["piqa"] |= own or {}
        return write_run(
            tmp_path / name, rows, task_settings=settings, **{"n-shot": dict.fromkeys(rows, 1)},
            config={"fewshot_seed": last, "settings": {"max_length": last}},
        )  # fmt: skip

    one = folder("one", 1, 7)
    same = compare(one, folder("same", 2, 7))
    assert {row.task for row in same.rows} == set(rows)
    assert not same.notes
    with pytest.raises(MlxSvdError, match="piqa: the seed of the examples differs: 7 in A, 8 in B"):
        compare(one, folder("other", 1, 7, {"seed": 8}))
    assert compare(one, folder("short", 1, 7, {"context": 24})).notes == [
        "max_length: 1024 in A, 24 in B (piqa)"
    ]


def test_other_precision_and_context_are_said(tmp_path):
    a, b = (
        write_run(
            tmp_path / name,
            {"piqa": TEN},
            config={"model_dtype": dtype, "settings": {"max_length": length, "scoring": "words"}},
        )
        for name, dtype, length in (("a", "float32", None), ("b", "bfloat16", 512))
    )
    assert compare(a, b).notes == [
        "max_length: None in A, 512 in B",
        "dtype: float32 in A, bfloat16 in B",
    ]


def test_wrong_margins_and_metrics_are_refused(folders):
    with pytest.raises(MlxSvdError, match="margin 0"):
        compare(*folders, margin=0.0)
    with pytest.raises(MlxSvdError, match=r"no metric mc9 in common .*leave out --metrics"):
        compare(*folders, metrics=["acc", "mc9"])
