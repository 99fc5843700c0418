"""Interrupted and continued compressions give the bytes of one uninterrupted run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_svd
from mlx_svd.checkpoint.layout import quantization
from mlx_svd.compress import compress
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe
from mlx_svd.source.source import open_source
from tests.tiny import tiny_config, tiny_tensors, write_shards, write_tiny

HALF = RankPolicy(rank_ratio=0.5)
RECIPES = {
    "factored": Recipe(("q", "k", "v", "o"), HALF, form="factored"),
    "pivot": Recipe(("q", "k", "v", "o", "up"), HALF, form="pivot"),
    "dense, energy": Recipe(policy=RankPolicy(energy=0.9), form="dense"),
    "corrected": Recipe(policy=HALF, form="corrected", quantize=quantization(4, 32)),
    "rotated, 8 bits": Recipe(policy=HALF, quantize=quantization(8, 32)),
}
COMMAND = "mlx-svd compress --model x"


class Interrupted(BaseException):
    """Stands for a signal between two units."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(model: Path, recipe: Recipe, target: Path, stop: int | None = None, **options) -> list[str]:
    """Compress anew from opening the source, as a new process would; interrupted after ``stop``
    units. Returns the units that ``advance`` was told."""
    told = []

    def advance(unit) -> None:
        told.append(unit.path)
        if len(told) == stop:
            raise Interrupted

    source = open_source(str(model))
    compress(source, make_plan(source, recipe), target, COMMAND, advance, **options)
    return told


def units(model: Path, recipe: Recipe) -> list[str]:
    return [unit.path for unit in make_plan(open_source(str(model)), recipe).units]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_run_interrupted_after_any_number_of_units_continues_with_equal_bytes(
    family, recipe, tmp_path
):
    model = write_tiny(family, tmp_path / "model", dtype=mx.bfloat16)
    run(model, RECIPES[recipe], tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    names = units(model, RECIPES[recipe])
    for stop in (1, 2, 5, len(names) // 2, len(names) - 1, len(names)):
        target = tmp_path / f"stopped-{stop}"
        with pytest.raises(Interrupted):
            run(model, RECIPES[recipe], target, stop)
        assert not target.exists()
        assert run(model, RECIPES[recipe], target) == names
        assert contents(target) == whole
        assert not target.with_name(target.name + ".incomplete").exists()


def test_run_interrupted_again_and_again_ends_with_equal_bytes(tmp_path):
    model = write_tiny("qwen2", tmp_path / "model", shards=3)
    recipe, target = RECIPES["factored"], tmp_path / "target"
    run(model, recipe, tmp_path / "whole")
    count = len(units(model, recipe))
    for stop in range(1, count + 1, 3):
        with pytest.raises(Interrupted):
            run(model, recipe, target, stop)
    run(model, recipe, target)
    assert contents(target) == contents(tmp_path / "whole")


def test_number_of_workers_does_not_change_a_bit(tmp_path):
    model = write_tiny("llama", tmp_path / "model", dtype=mx.bfloat16, num_hidden_layers=4)
    for name, recipe in RECIPES.items():
        for workers in (1, 2, 4):
            run(model, recipe, tmp_path / f"{name} {workers}", workers=workers)
        one = contents(tmp_path / f"{name} 1")
        assert contents(tmp_path / f"{name} 2") == one
        assert contents(tmp_path / f"{name} 4") == one


def test_run_continued_with_another_number_of_workers_gives_equal_bytes(tmp_path):
    model = write_tiny("llama", tmp_path / "model", num_hidden_layers=4)
    run(model, RECIPES["pivot"], tmp_path / "whole", workers=1)
    with pytest.raises(Interrupted):
        run(model, RECIPES["pivot"], tmp_path / "target", 7, workers=4)
    run(model, RECIPES["pivot"], tmp_path / "target", workers=2)
    assert contents(tmp_path / "target") == contents(tmp_path / "whole")


def test_continued_run_reads_only_what_is_left(tmp_path, monkeypatch):
    from mlx_svd.source.source import TensorStream

    model, recipe, taken = write_tiny("llama", tmp_path / "model"), RECIPES["factored"], []
    take = TensorStream.take
    monkeypatch.setattr(
        TensorStream, "take", lambda self, name: (taken.append(name), take(self, name))[1]
    )
    with pytest.raises(Interrupted):
        run(model, recipe, tmp_path / "target", 6, workers=1)
    first, names = set(taken), units(model, recipe)
    taken.clear()
    run(model, recipe, tmp_path / "target", workers=1)
    done = [name for name in first if name.rpartition(".")[0] in names[:6]]
    assert done
    assert not set(done) & set(taken)


def test_interrupted_run_is_not_continued_with_another_plan_or_changed_weights(tmp_path):
    model, target = write_tiny("llama", tmp_path / "model"), tmp_path / "target"
    with pytest.raises(Interrupted):
        run(model, RECIPES["factored"], target, 5)
    before = contents(tmp_path / "target.incomplete")
    with pytest.raises(MlxSvdError, match="other settings or another source; delete it"):
        run(model, RECIPES["pivot"], target)
    config = tiny_config("llama")
    tensors = {n: mx.array(t) for n, t in tiny_tensors(config, seed=1).items()}
    write_shards(model, tensors, 1)
    with pytest.raises(MlxSvdError, match="other settings or another source; delete it"):
        run(model, RECIPES["factored"], target)
    assert contents(tmp_path / "target.incomplete") == before
    assert not target.exists()


def test_damaged_tensor_stops_the_run_and_is_refused_again(tmp_path):
    model = write_tiny("llama", tmp_path / "model")
    tensors = mx.load(str(model / "model.safetensors"))
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name] * float("nan")
    mx.eval(tensors)
    write_shards(model, tensors, 1)
    for _ in range(2):
        with pytest.raises(MlxSvdError, match=f"{name} holds NaN or Inf"):
            run(model, RECIPES["factored"], tmp_path / "target")
        assert not (tmp_path / "target").exists()
        assert "config.json" not in contents(tmp_path / "target.incomplete")


# -- processes ------------------------------------------------------------------------------------


def start(*argv: object) -> subprocess.Popen:
    root = str(Path(mlx_svd.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_svd", *map(str, argv)],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background makes them ignore SIGINT, for good.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """(exit code, standard error without blank lines)."""
    err = process.communicate(timeout=600)[1]
    return process.returncode, err.strip()


def wait_for_units(folder: Path, count: int, process: subprocess.Popen) -> None:
    """Until the journal of the unfinished run has that many units."""
    journal = folder / "journal.jsonl"
    while process.poll() is None:
        if journal.is_file() and journal.read_bytes().count(b"\n") > count:
            return
        time.sleep(0.005)


def test_interrupt_key_prints_one_line_exits_with_130_and_the_run_can_be_continued(tmp_path):
    model = write_tiny("llama", tmp_path / "model", num_hidden_layers=40)
    target = tmp_path / "target"
    plain = ("--rank-ratio", 0.5, "--scorer", "plain")
    argv = ("compress", "--model", model, *plain, "--mlx-path", target)
    process = start(*argv)
    wait_for_units(tmp_path / "target.incomplete", 10, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("note: ")]
    assert len(lines) == 1
    assert "continues where it stopped" in lines[0]
    assert not target.exists()
    assert (tmp_path / "target.incomplete").is_dir()
    code, err = finish(start(*argv))
    assert code == 0, err
    assert "model.safetensors" in contents(target)


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_next_run_gives_the_files_of_one_run(
    shared, tmp_path, monkeypatch
):
    """kill -9 between the start and the end of an uninterrupted run, then the same command."""
    monkeypatch.chdir(tmp_path)  # the card holds the command, so each run has the same --mlx-path
    target = Path("target")
    argv = (
        "compress",
        "--model",
        shared / "models" / "llama-44m",
        "--rank-ratio",
        0.6,
        "--scorer",
        "plain",
    )
    argv += ("--projections", "all", "--form", "pivot", "--mlx-path", target)
    begun = time.monotonic()
    assert finish(start(*argv)) == (0, "")
    duration = time.monotonic() - begun
    target.rename("whole")
    whole = contents(Path("whole"))
    moments, recorded = random.Random(), []
    for number in range(10):
        process = start(*argv)
        # One in each tenth of the run, and the first half second is only imports.
        time.sleep(0.5 + (duration - 0.5) * (number + moments.random()) / 10)
        process.kill()
        finish(process)
        journal = Path("target.incomplete", "journal.jsonl")
        recorded.append(journal.read_bytes().count(b"\n") if journal.exists() else 0)
        if not target.exists():
            assert finish(start(*argv)) == (0, "")
        assert contents(target) == whole, f"killed at moment {number}"
        assert not Path("target.incomplete").exists()
        target.rename(f"done-{number}")
    print(f"units recorded at the kills: {recorded}")
    assert len({count for count in recorded if count > 1}) >= 3, recorded


@pytest.mark.slow
def test_two_runs_at_once_the_second_is_refused_and_the_first_is_not_harmed(shared, tmp_path):
    model = shared / "models" / "llama-44m"
    argv = (
        "compress",
        "--model",
        model,
        "--rank-ratio",
        0.6,
        "--scorer",
        "plain",
        "--mlx-path",
        tmp_path / "target",
    )
    first = start(*argv)
    wait_for_units(tmp_path / "target.incomplete", 3, first)
    code, err = finish(start(*argv))
    assert code == 2
    assert "another mlx-svd is writing this folder" in err or "exists already" in err
    assert finish(first)[0] == 0
    source = open_source(str(model))
    plan = make_plan(source, Recipe(policy=RankPolicy(rank_ratio=0.6)))
    loaded = mx.load(str(tmp_path / "target" / "model.safetensors"))
    assert sum(tensor.nbytes for tensor in loaded.values()) == plan.bytes_after
