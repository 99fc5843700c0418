"""``mlx-svd compare`` prints what the library finds; its exit codes."""

import json
from functools import partial

import pytest

from mlx_svd.evaluate.comparison.compare import compare
from mlx_svd.evaluate.comparison.table import json_text, legend, remarks, table_rows
from tests.evaluate.result_folders import answers, flipped, losses, texts, write_run


@pytest.fixture
def run(run):
    return partial(run, "compare")


@pytest.fixture
def folders(tmp_path):
    a, b = flipped(500, 20, 12)
    return [
        write_run(tmp_path / name, {"piqa": answers(r), "wikitext": losses(s)})
        for name, r, s in (("base", a, 0.0), ("small", b, 0.02))
    ]


@pytest.fixture
def looping(tmp_path):
    return [write_run(tmp_path / f"loops-{n}", {"generation": texts(n)}) for n in (10, 60)]


def test_terminal_shows_every_cell_the_legend_and_the_remarks(run, folders):
    code, out, err = run(*folders)
    found = compare(*folders)
    assert (code, err) == (0, "")
    for cells in table_rows(found):
        printed = next(line for line in out.splitlines() if line.split()[:2] == cells[:2])
        assert printed.split() == " ".join(cells).split()
    assert legend(found) in out
    for remark in remarks(found):
        assert remark in out
    assert "n too small for these claims" in out


def test_no_number_is_cut_off_however_narrow_the_terminal(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    a, b = flipped(500, 20, 12, right=0.5)
    interval = {"piqa": {"acc": {"chance": 0.5}}}
    a, b = (
        write_run(tmp_path / n, {"piqa": answers(r)}, intervals=interval)
        for n, r in (("a", a), ("b", b))
    )
    out = run(a, b)[1]
    assert "…" not in out
    assert " ".join(table_rows(compare(a, b))[0]).split() in [
        line.split() for line in out.splitlines()
    ]


def test_json_is_the_whole_record_on_stdout(run, folders):
    code, out, _ = run(*folders, "--json", "--margin", "0.05", "--metrics", "acc")
    assert code == 0
    assert out == json_text(compare(*folders, margin=0.05, metrics=["acc"]))
    assert json.loads(out)["margin"] == 0.05


def test_output_dir_gets_json_markdown_and_csv(run, folders, tmp_path):
    assert run(*folders, "--output-dir", tmp_path / "out")[0] == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "compare.json", "compare.md", "compare.csv",
    }  # fmt: skip


def test_gate_exits_with_3_only_when_asked_and_only_when_it_fails(run, looping):
    good, bad = looping
    assert run(good, bad)[0] == 0
    code, out, _ = run(good, bad, "--gate")
    assert code == 3
    assert "gate: fail" in out
    assert run(good, good, "--gate")[0] == 0
    assert run(good, bad, "--gate", "--gate-margin", "0.6")[0] == 0
    code, out, _ = run(good, bad, "--gate", "--gate-metrics", "loop,rep_3")
    assert code == 3
    assert "rep_3, greedy" in out
    one_error(run(good, bad, "--gate-metrics", "distinct_1"), "--gate-metrics", "loop, rep_2")
    code, out, _ = run(good, bad, "--gate", "--json")
    assert code == 3
    assert json.loads(out)["gate"]["verdict"] == "fail"


def one_error(result, *words):
    code, out, err = result
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    for word in words:
        assert word in err, err


def test_bad_input_is_one_line_that_names_it(run, folders, looping, tmp_path):
    a, b = folders
    one_error(run(a, tmp_path / "none"), str(tmp_path / "none"), "no such folder")
    one_error(run(a, tmp_path), str(tmp_path), "several runs")
    one_error(run(a, looping[0]), "no task in common", "wikitext", "generation")
    one_error(run(a, b, "--margin", "-1"), "margin -1")
    one_error(run(a, b, "--metrics", "mc9"), "mc9")
    one_error(run(a, b, "--gate"), "--gate", "generation")
    one_error(run(*looping, "--gate-margin", "2"), "gate margin 2")
    (b / "samples_piqa.jsonl").write_text('{"id": "piqa-0", "acc": 1}\n{"id": "pi')
    one_error(run(a, b), str(b / "samples_piqa.jsonl"), "line 2")


def test_an_output_that_cannot_be_written_is_one_line(run, folders, tmp_path):
    (tmp_path / "file").write_text("")
    one_error(run(*folders, "--output-dir", tmp_path / "file" / "out"), "file", "--output-dir")
