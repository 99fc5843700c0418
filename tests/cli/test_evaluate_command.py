"""``mlx-svd evaluate``: what it prints, what it writes, how it refuses."""

import json
import sys

import pytest

from mlx_svd.cli import app
from mlx_svd.demo import DEMO_MODEL

ROWS = [
    {"question": "The capital of France is", "choices": ["Rome", "Paris"], "label": 1},
    {"question": "The capital of Italy is", "choices": ["Rome", "Paris"], "label": 0},
    {"question": "The capital of Spain is", "choices": ["Madrid", "Oslo"], "label": 0},
]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "capitals.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """(tasks, options) -> (exit code, stdout, stderr)."""

    def main(tasks, *options):
        argv = ["mlx-svd", "evaluate", "--model", DEMO_MODEL, "--tasks", tasks, "--dtype"]
        argv += ["float32", "--output-dir", tmp_path / "out", *options]
        monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
        with pytest.raises(SystemExit) as exited:
            app.main()
        captured = capsys.readouterr()
        return exited.value.code or 0, captured.out, captured.err

    return main


def test_a_table_is_printed_and_the_files_are_written(rows, run, tmp_path):
    code, out, _ = run(rows)
    assert code == 0
    (line,) = (line for line in out.splitlines() if " acc ↑" in line)
    assert line.split()[:4] == ["capitals", "0", "acc", "↑"]
    assert "1.0000" in line
    assert "0.5000" in line, "the chance level"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"samples_capitals.jsonl", "conditions_capitals.json", "results.json",
                     "results.md", "results.csv"}  # fmt: skip


def test_json_is_the_results_file(rows, run, tmp_path):
    code, out, _ = run(rows, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "out/results.json").read_text())


def test_options_reach_the_conditions(rows, run, tmp_path):
    code, _, _ = run(rows, "--limit", 2, "--seed", 9, "--num-fewshot", 1, "--random-rows")
    assert code == 0
    conditions = json.loads((tmp_path / "out/conditions_capitals.json").read_text())
    assert {k: conditions[k] for k in ("limit", "seed", "num_fewshot", "random_rows")} == {
        "limit": 2, "seed": 9, "num_fewshot": 1, "random_rows": True
    }  # fmt: skip


BAD = {
    "unknown task": (("hellasweg",), ("hellasweg", "no such task", "hellaswag")),
    "missing file": (("no/rows.jsonl",), ("no/rows.jsonl", "no such file of rows")),
    "no task": ((",",), ("--tasks", "names no task")),
    "scoring": (("reasoning", "--scoring", "x"), ("--scoring x", "words or seed")),
    "limit": (("reasoning", "--limit", "0"), ("--limit 0", "at least 1")),
    "data folder": (("piqa", "--data-dir", "no/folder"), ("no/folder", "no such folder")),
    "longer than the model": (
        ("reasoning", "--max-length", "4096"),
        ("--max-length 4096", "context of 1024"),
    ),
    "kl without a base": (("kl", "--data-dir", "/"), ("kl: compares", "give --base MODEL")),
    "a file as folder": (("reasoning", "--output-dir", __file__), ("--output-dir",)),
    "dtype": (("reasoning", "--dtype", "int8"), ("--dtype int8", "float32, float16, bfloat16")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, run, tmp_path):
    arguments, words = BAD[case]
    code, out, err = run(*arguments)
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert not out
    assert not (tmp_path / "out").exists()
