"""Healings that were stopped and repeated give the bytes of one uninterrupted run."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from mlx_svd.checkpoint.layout import quantization
from mlx_svd.checkpoint.writer import CheckpointWriter
from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune import heal
from mlx_svd.finetune.state import StateFolder
from mlx_svd.plan.recipe import Recipe
from mlx_svd.source.families import PROJECTIONS
from tests.finetune.conftest import FACTORED, HALF, SETTINGS, contents

RECIPES = {
    "factored": FACTORED,
    "3 bits": Recipe(PROJECTIONS, HALF, form="factored", quantize=quantization(3, 32)),
}
STOPS = {"factored": (0, 1, 2, 3, 6), "3 bits": (3,)}


class Interrupted(BaseException):
    """Stands for a signal between two steps."""


def run(data, target, stop=None, settings=SETTINGS):
    """Heal as a new process would, interrupted when ``stop`` is reached; the steps told."""
    told = []

    def advance(step):
        told.append(step.step)
        if step.step == stop:
            raise Interrupted

    heal(data.student, data.teacher, target, settings, text=data.text, advance=advance)
    return told


@pytest.mark.parametrize("recipe", RECIPES)
def test_interrupted_after_any_step_continues_from_the_last_saved_one(recipe, material, tmp_path):
    data = material(RECIPES[recipe])
    assert run(data, tmp_path / "whole") == list(range(7))
    whole = contents(tmp_path / "whole")
    for stop in STOPS[recipe]:
        target = tmp_path / f"stopped-{stop}"
        with pytest.raises(Interrupted):
            run(data, target, stop)
        assert not target.exists()
        saved = stop - stop % SETTINGS.save_every
        assert run(data, target) == list(range(saved, 7))
        assert contents(target) == whole
        assert [p.name for p in tmp_path.glob(f"stopped-{stop}*")] == [target.name]


def test_interrupted_again_and_again_ends_with_equal_bytes(material, tmp_path):
    data, settings = material(), replace(SETTINGS, save_every=1)
    run(data, tmp_path / "whole", settings=settings)
    for stop in (1, 2, 4, 5):
        with pytest.raises(Interrupted):
            run(data, tmp_path / "target", stop, settings)
    run(data, tmp_path / "target", settings=settings)
    assert contents(tmp_path / "target") == contents(tmp_path / "whole")


def test_interrupted_while_writing_continues_without_training(material, tmp_path, monkeypatch):
    data = material()
    run(data, tmp_path / "whole")
    real, written = CheckpointWriter.write, []

    def write(self, unit, *rest):
        written.append(unit)
        if len(written) == 5:
            raise Interrupted
        real(self, unit, *rest)

    monkeypatch.setattr(CheckpointWriter, "write", write)
    with pytest.raises(Interrupted):
        run(data, tmp_path / "target")
    assert run(data, tmp_path / "target") == [6]
    # The four that were complete are not written again.
    assert len(written) == len(set(written)) + 1
    assert contents(tmp_path / "target") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "change",
    [{"lr": 0.004}, {"seed": 1}, {"steps": 7}, {"train": "norms"}, {"save_every": 1}, {"text": 1}],
)
def test_state_of_a_run_with_other_settings_or_text_is_refused(change, material, tmp_path):
    data = material()
    with pytest.raises(Interrupted):
        run(data, tmp_path / "target", 4)
    if "text" in change:
        data.text.write_text(data.text.read_text()[::-1])
        change = {}
    with pytest.raises(MlxSvdError, match=r"target.healing: holds an unfinished healing with"):
        run(data, tmp_path / "target", settings=replace(SETTINGS, **change))
    assert not (tmp_path / "target.incomplete").exists()


def test_state_of_another_student_is_refused(material, tmp_path):
    data = material()
    with pytest.raises(Interrupted):
        run(data, tmp_path / "target", 4)
    os.utime(data.student / "model.safetensors")
    with pytest.raises(MlxSvdError, match=r"holds an unfinished healing with other settings"):
        run(data, tmp_path / "target")


def test_two_healings_of_one_target_at_once_are_refused(material, tmp_path):
    data = material()

    def second(step):
        with pytest.raises(MlxSvdError, match=r"another mlx-svd is writing this folder"):
            run(data, tmp_path / "target")
        raise Interrupted

    with pytest.raises(Interrupted):
        heal(
            data.student,
            data.teacher,
            tmp_path / "target",
            SETTINGS,
            text=data.text,
            advance=second,
        )


def test_same_seed_gives_equal_bytes_and_another_seed_others(material, tmp_path):
    data = material()
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        run(data, tmp_path / name, settings=replace(SETTINGS, seed=seed))
    assert contents(tmp_path / "one") == contents(tmp_path / "same")
    file = "model.safetensors"
    assert contents(tmp_path / "one")[file] != contents(tmp_path / "other")[file]


def test_killed_process_continues_when_the_command_is_repeated(material, tmp_path):
    data = material()

    def command(target):
        options = {"model": data.student, "teacher": data.teacher, "text": data.text}
        options |= {"mlx-path": target, "windows": 24, "length": 24, "steps": 16, "lr": 0.005}
        options |= {"batch-size": 2, "save-every": 1}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "-m", "mlx_svd", "heal", *words]

    state = StateFolder(tmp_path / "out", "").path / "state.json"
    with subprocess.Popen(command(tmp_path / "out"), stderr=subprocess.DEVNULL) as process:
        while not state.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert state.exists()
    done = subprocess.run(command(tmp_path / "out"), capture_output=True, text=True, check=True)
    assert "continuing after step" in done.stderr
    subprocess.run(command(tmp_path / "whole"), capture_output=True, check=True)
    out, whole = contents(tmp_path / "out"), contents(tmp_path / "whole")
    # The card names the command, and with it the folder.
    assert out.pop("README.md").replace(b"path out", b"path whole") == whole.pop("README.md")
    assert out == whole
