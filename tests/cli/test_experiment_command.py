"""``mlx-svd experiment run``: what it prints, what it writes, how it refuses."""

import json
import sys

import pytest
import yaml

from mlx_svd.cli import app
from mlx_svd.demo import DEMO_MODEL
from tests.experiments.matrix.capitals import capitals

CONFIG = {
    "title": "q, k, o at half of the ranks",
    "kind": "compression",
    "primary": "perplexity",
    "baseline": "uncompressed",
    "settings": {
        "model": str(DEMO_MODEL),
        "texts": {"passage": {"file": "text.txt", "windows": 2, "length": 64}},
        "facts": {"file": "facts.json"},
    },
    "conditions": [
        {"name": "uncompressed"},
        {"name": "half", "steps": [{"truncate": {"projections": "q,k,o", "rank_ratio": 0.5}}]},
    ],
}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """(changes of the file, options) -> (exit code, stdout, stderr)."""
    (tmp_path / "text.txt").write_text(DEMO_MODEL.with_name("passage.txt").read_text())
    (tmp_path / "facts.json").write_text(json.dumps(capitals()))

    def main(changes, *options):
        (tmp_path / "half.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))
        argv = ["mlx-svd", "experiment", "run", tmp_path / "half.yaml", "--data-dir", tmp_path]
        argv += ["--output", tmp_path / "out", "--limit", 4, *options]
        monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
        with pytest.raises(SystemExit) as exited:
            app.main()
        captured = capsys.readouterr()
        return exited.value.code or 0, captured.out, captured.err

    return main


def test_a_dry_run_says_what_is_left_and_a_run_does_it(run, tmp_path):
    code, out, _ = run({}, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out) == {
        "experiment": "half", "conditions": 2, "runs": 2, "left": 2, "seconds": None,
        "guessed_runs": 0, "missing": ["uncompressed", "half"],
    }  # fmt: skip
    code, out, err = run({}, "--plot", tmp_path / "half.png")
    assert code == 0
    assert (tmp_path / "half.png").read_bytes().startswith(b"\x89PNG")
    assert "[2/2] half" in err
    assert "# q, k, o at half of the ranks" in out
    assert "Differences: perplexity" in out
    names = {path.name for path in (tmp_path / "out" / "half").iterdir()}
    assert names == {"records", "results.json", "results.md", "results.csv"}
    code, out, _ = run({}, "--dry-run")
    assert "2 runs, 0 left, about 0 s" in out


def test_bad_input_is_one_line_and_exit_code_2(run):
    for changes in ({"kind": "alchemy"}, {"conditions": [{"name": "a", "steps": [{"x": 1}]}]}):
        code, out, err = run(changes)
        assert (code, out) == (2, "")
        assert len(err.strip().splitlines()) == 1
