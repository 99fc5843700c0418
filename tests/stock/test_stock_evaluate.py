"""An evaluation shared by two processes of mlx.launch gives the bits of one process."""

import json
import os
import sys
import sysconfig
from pathlib import Path

import pytest

from mlx_svd.demo import DEMO_MODEL

pytestmark = pytest.mark.stock

CAPITALS = (
    ("France", "Paris"),
    ("Italy", "Rome"),
    ("Spain", "Madrid"),
    ("Russia", "Moscow"),
    ("Egypt", "Cairo"),
    ("Greece", "Athens"),
    ("Norway", "Oslo"),
    ("Peru", "Lima"),
)
SCRIPTS = Path(sysconfig.get_path("scripts"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """(choices, answers, text): three files that are tasks."""
    folder = tmp_path_factory.mktemp("rows")
    choices = [
        {"question": f"The capital of {c} is", "choices": [o, CAPITALS[n - 1][1]], "label": 0}
        for n, (c, o) in enumerate(CAPITALS)
    ]
    answers = [{"prompt": f"The capital of {c} is", "answer": o} for c, o in CAPITALS]
    for name, content in (("choices", choices), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "story.txt").write_text("A man lived by the sea, and the sea was his friend.\n" * 30)
    return folder


@pytest.fixture(scope="module")
def evaluate(rows, run_command, environment, free_ports):
    """(folder, processes, *options) -> runs the command in so many processes."""
    # One thread each: with more, two processes on the same cores wait for each other.
    threads = environment | {"OPENBLAS_NUM_THREADS": "1"}

    def run(output, processes, *options, check=True):
        tasks = ",".join(
            str(rows / name) for name in ("choices.jsonl", "answers.jsonl", "story.txt")
        )
        command = [sys.executable, str(SCRIPTS / "mlx-svd"), "evaluate", "--model", str(DEMO_MODEL)]
        command += ["--tasks", tasks, "--output-dir", str(output), "--dtype", "float32"]
        command += ["--max-length", "64", "--batch-tokens", "24", "--base", str(DEMO_MODEL)]
        command += options
        if processes > 1:
            launch = [sys.executable, str(SCRIPTS / "mlx.launch"), "-n", str(processes)]
            launch += ["--backend", "ring", "--starting-port", str(free_ports(processes)), "--"]
            command = launch + command
        # mlx.launch polls stdin without pause once that is at its end: an open pipe keeps it quiet.
        read, write = os.pipe()
        try:
            return run_command(command, stdin=read, env=threads, check=check)
        finally:
            os.close(read)
            os.close(write)

    return run


@pytest.fixture(scope="module")
def alone(evaluate, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    evaluate(folder, 1)
    return folder


def results(folder, done):
    path = folder / "results.json"
    assert path.is_file(), f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return json.loads(path.read_text())


def assert_same_samples(folder, alone):
    names = sorted(path.name for path in alone.glob("samples_*.jsonl"))
    assert len(names) == 3
    for name in names:
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name


def test_two_processes_give_the_bits_of_one(evaluate, alone, tmp_path):
    done = evaluate(tmp_path, 2)
    found = results(tmp_path, done)
    assert found["processes"] == 2
    assert_same_samples(tmp_path, alone)
    assert found["results"] == json.loads((alone / "results.json").read_text())["results"]
    assert done.stdout.count("95 % interval") == 1, "one process prints"


def test_two_processes_go_on_where_one_was_killed(evaluate, alone, tmp_path):
    for path in alone.glob("conditions_*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lines = (alone / "samples_story.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) > 3
    (tmp_path / "samples_story.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])
    results(tmp_path, evaluate(tmp_path, 2))
    assert_same_samples(tmp_path, alone)


def test_bad_input_stops_both_processes(evaluate, alone, tmp_path):
    for path in alone.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "results.json").unlink()
    done = evaluate(tmp_path, 2, "--seed", "5", check=False)
    assert "another seed" in done.stdout + done.stderr
    assert not (tmp_path / "results.json").exists()
