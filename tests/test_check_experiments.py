"""The script that compares experiments run here with the published tables."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/check_experiments.py"
HEADER = "condition,metric,value,std,over_items,over_seeds,items,runs\n"


def check(*folders: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True)


def write(folder: Path, *rows: str) -> None:
    (folder / "exp").mkdir(parents=True)
    (folder / "exp/results.csv").write_text(HEADER + "".join(f"{row}\n" for row in rows))


def test_the_largest_difference_is_named_and_other_numbers_of_runs_are_not_compared(tmp_path):
    write(tmp_path / "published", "a,facts,0.5,,,,9,5", "b,facts,0.25,,,,9,5",
          "a,perplexity,30,,,,8,5", "c,facts,,,,,9,5", "d,facts,1,,,,9,5")  # fmt: skip
    write(tmp_path / "here", "a,facts,0.5,,,,9,5", "b,facts,0.375,,,,9,5",
          "a,perplexity,31,,,,8,1", "c,facts,0.5,,,,9,5")  # fmt: skip
    found = check(tmp_path / "here", tmp_path / "published")
    assert found.returncode == 0, found.stderr
    assert "exp (not compared: 3 values)" in found.stdout
    assert "| facts | 2 | 1 | 1.2e-01 | b: 0.25, here 0.375 |" in found.stdout
    assert "perplexity" not in found.stdout


def test_a_folder_without_results_is_named(tmp_path):
    write(tmp_path / "published", "a,facts,0.5,,,,9,5")
    found = check(tmp_path, tmp_path / "published")
    assert found.returncode == 1
    assert f"{tmp_path}: holds no results.csv" in found.stderr
