"""``mlx-svd heal`` does what the library does and prints it."""

import json

import pytest

from mlx_svd.demo import DEMO_MODEL
from mlx_svd.demo.run import PASSAGE
from mlx_svd.finetune import HealSettings, heal

OPTIONS = ("--windows", "6", "--length", "32", "--steps", "3", "--batch-size", "1", "--lr", "0.01")


@pytest.fixture
def student(run, tmp_path):
    folder = tmp_path / "student"
    options = ("--rank-ratio", "0.4", "--projections", "all", "--form", "factored")
    assert run("compress", "--model", DEMO_MODEL, "--mlx-path", folder, *options)[0] == 0
    return folder


def arguments(student, out, *more):
    folders = ("--model", student, "--teacher", DEMO_MODEL, "--mlx-path", out)
    return ("heal", *folders, "--text", PASSAGE, *OPTIONS, *more)


def test_heal_prints_both_divergences_and_inspect_tells_it(run, student, tmp_path):
    out = tmp_path / "out"
    code, printed, progress = run(*arguments(student, out))
    assert code == 0
    settings = HealSettings(windows=6, length=32, steps=3, batch_size=1, lr=0.01)
    healed = heal(student, DEMO_MODEL, tmp_path / "library", settings, text=PASSAGE)
    file = "model.safetensors"
    assert (out / file).read_bytes() == (tmp_path / "library" / file).read_bytes()
    change = f"{healed.kl_before:.4f} -> {healed.kl_after:.4f}"
    assert change in printed
    assert "for 3 steps on 5 windows of passage.txt" in printed
    assert f"{out}: written as of step {healed.best_step}" in printed
    assert f"step 0 of 3: validation KL {healed.kl_before:.4f}" in progress
    inspected = run("inspect", out)[1]
    assert f"healed: 3 steps from model on passage.txt, KL {change} nats per token" in inspected
    assert "healed" not in run("inspect", student)[1]


def test_json_is_one_document_on_stdout(run, student, tmp_path):
    code, printed, _ = run(*arguments(student, tmp_path / "out", "--json"))
    assert code == 0
    result = json.loads(printed)
    assert result["mlx_path"] == str(tmp_path / "out")
    assert result["kl_after"] < result["kl_before"]
    assert (result["training_windows"], result["held_out_windows"]) == (5, 1)


def test_text_with_fewer_windows_than_asked_for_is_told(run, student, tmp_path):
    code, printed, _ = run(*arguments(student, tmp_path / "out"), "--windows", "100000")
    assert code == 0
    assert "passage.txt: has only" in printed


def test_no_better_step_is_told(run, student, tmp_path):
    code, printed, _ = run(*arguments(student, tmp_path / "out"), "--lr", "20")
    assert code == 0
    assert "no step was better than the start" in printed


def test_bad_input_is_one_line(run, student, tmp_path):
    for more, words in (
        (("--lr", "0"), "--lr 0.0: must be a number above 0"),
        (("--teacher", student), "compressed or quantized itself"),
        (("--mlx-path", student), "exists already"),
    ):
        code, printed, err = run(*arguments(student, tmp_path / "out", *more))
        assert (code, printed) == (2, "")
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
        assert words in err


def test_damaged_record_of_a_healing_is_one_line(run, student):
    path = student / "config.json"
    config = json.loads(path.read_text())
    config["mlx_svd"]["healed"] = {"steps": 3}
    path.write_text(json.dumps(config))
    code, _, err = run("inspect", student)
    assert code == 2
    assert "config.json: its mlx_svd.healed section is damaged" in err
