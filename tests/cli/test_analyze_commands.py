"""``mlx-svd analyze`` saves, plots and prints what the library finds."""

import json
from functools import partial

import pytest

from mlx_svd.demo import DEMO_MODEL
from mlx_svd.demo.run import PASSAGE

TEXT = ("--text", PASSAGE, "--windows", "2", "--length", "24")


@pytest.fixture
def run(run):
    return partial(run, "analyze")


COMMANDS = {
    "spectrum": (*TEXT, "--layers", "0", "--projections", "attention"),
    "layers": (*TEXT, "--layers", "0-1", "--projections", "q,v", "--scan", "type"),
    "cliff": (*TEXT, "--ratios", "0.9:0.1:-0.1", "--prompts", "1", "--max-tokens", "8"),
    "depth": (*TEXT, "--layers", "0-2", "--ratio", "0.3"),
}
HEADS = {
    "spectrum": "break-even",
    "layers": "verdict",
    "cliff": "energy lost",
    "depth": "block 0",
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_result_plot_and_table(run, tmp_path, verb):
    out, plot = tmp_path / "r.json", tmp_path / "r.svg"
    code, printed, told = run(
        verb, "--model", DEMO_MODEL, "--output", out, "--plot", plot, *COMMANDS[verb]
    )
    assert code == 0
    result = json.loads(out.read_text())
    assert result["analysis"] == verb
    assert result["conditions"]["command"].startswith(f"mlx-svd analyze {verb} --model")
    assert str(tmp_path) not in result["conditions"]["command"]
    assert "<svg" in plot.read_text()
    assert f"{out}: written" in told
    assert HEADS[verb] in printed
    if verb == "cliff":
        assert "log_energy_lost: " in printed
        assert len(result["points"]) == 10


def test_json_is_one_document(run, tmp_path):
    out = tmp_path / "r.json"
    code, printed, _ = run(
        "spectrum", "--model", DEMO_MODEL, "-o", out, "--layers", "5", "--projections", "k",
        "--no-activations", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(printed) == json.loads(out.read_text())
    (row,) = json.loads(printed)["projections"]
    assert row["weighted"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("spectrum", "-o", "r.txt"), "--output r.txt: give a file that ends in .json"),
        (("layers", "-o", "r.json", "--plot", "r.doc"), "r.doc: a plot ends in"),
        (("layers", "-o", "r.json", "--layers", "6"), "--layers 6: model has layers 0 to 5"),
        (("layers", "-o", "r.json", "--scan", "block"), "scan 'block': use layer, type, head"),
        (("cliff", "-o", "r.json", "--ratios", "2"), "rank_ratio 2.0: must be above 0"),
        (("cliff", "-o", "r.json", "--scorer", "whitened"), "give --calibration"),
        (("depth", "-o", "r.json", "--layers", "1,2"), "the law of growth needs three or more"),
        (("depth", "-o", "r.json", "--rank", "3", "--energy", "0.9"), "give one of them"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, told = run(arguments[0], "--model", DEMO_MODEL, *arguments[1:])
    assert code == 2
    error = told.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "r.json").exists()
