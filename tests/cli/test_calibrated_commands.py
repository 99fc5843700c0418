"""calibrate, and plan and compress with a scorer or a budget, as a user types them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_svd.cli.app import app
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError

SMALL = ("--windows", "2", "--length", "32")
MODEL = ("--model", str(DEMO_MODEL))


def run(*args: object) -> str:
    """What the command prints on standard output; raises what it raises."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calibration") / "cal"
    run("calibrate", *MODEL, "--output", folder, *SMALL)
    return folder


def test_calibrate_says_what_it_measured_and_a_second_run_finds_it(calibration):
    info = json.loads(run("calibrate", *MODEL, "--output", calibration, *SMALL, "--json"))
    assert info["windows"] == 2
    assert info["moments"] == ["input", "output"]
    assert info["loss"] > 0


def test_budget_keeps_its_share_and_the_default_scorer_is_two_sided(calibration):
    command = ("plan", *MODEL, "--calibration", calibration, "--keep-bytes", 0.6, "--json")
    plan = json.loads(run(*command))
    touched = [p for p in plan["projections"] if p["projection"] in plan["compressible"]]
    kept = sum(p["bytes_after"] for p in touched) / sum(p["bytes_before"] for p in touched)
    assert 0.55 < kept <= 0.6
    assert plan["scorer"] == "two-sided"
    assert plan["calibration"]["windows"] == 2


def test_bits_and_forms_limit_what_a_budget_chooses(calibration):
    budget = ("--calibration", calibration, "--keep-bytes", 0.7, "--bits", "16", "--form", "pivot")
    plan = json.loads(run("plan", *MODEL, *budget, "--json"))
    forms = {p["form"] for p in plan["projections"]}
    assert forms <= {"dense", "pivot"}
    assert "pivot" in forms
    assert {p["quantization"] for p in plan["projections"]} == {None}


def test_ranks_are_whitened_by_default_and_compress_calibrates_by_itself(tmp_path):
    command = ("--rank-ratio", 0.4, *SMALL, "--json", "--mlx-path", tmp_path / "out")
    plan = json.loads(run("compress", *MODEL, *command))["plan"]
    assert plan["scorer"] == "whitened"
    assert plan["calibration"]["origin"] == "the text shipped with mlx-svd"


@pytest.mark.parametrize("verb", ["plan", "compress"])
def test_bytes_of_given_ranks_are_told_without_running_the_model(verb):
    dry = ("--dry-run",) if verb == "compress" else ()
    plan = json.loads(run(verb, *MODEL, "--rank-ratio", 0.4, *dry, "--json"))
    assert (plan["scorer"], plan["calibration"]) == ("whitened", None)


def test_plan_of_energies_calibrates_by_itself():
    plan = json.loads(run("plan", *MODEL, "--energy", 0.9, *SMALL, "--json"))
    assert plan["calibration"]["origin"] == "the text shipped with mlx-svd"


def test_plain_needs_no_calibration():
    plan = json.loads(run("plan", *MODEL, "--rank-ratio", 0.4, "--scorer", "plain", "--json"))
    assert plan["calibration"] is None


def test_seed_preset_is_the_importance_of_the_seed_documents():
    plan = json.loads(run("plan", *MODEL, "--preset", "seed", *SMALL, "--json"))
    assert plan["scorer"] == "importance"
    assert plan["importance_window"] == 2
    assert {p["form"] for p in plan["projections"]} == {"dense"}
    assert all(
        p["ranks"] == [int(0.7 * p["rank_limit"])]
        for p in plan["projections"]
        if p["projection"] in ("q", "k", "o")
    )


def test_sequential_compression_keeps_the_plan_and_rests_on_a_calibration_of_its_own(
    calibration, tmp_path
):
    given = ("--calibration", calibration, "--rank-ratio", 0.4, "--json")
    plain = json.loads(run("compress", *MODEL, *given, "--mlx-path", tmp_path / "a"))["plan"]
    options = (*given, "--sequential", "--mlx-path", tmp_path / "b")
    sequential = json.loads(run("compress", *MODEL, *options))["plan"]
    assert sequential["bytes_after"] == plain["bytes_after"]
    assert sequential["calibration"]["digest"] != plain["calibration"]["digest"]
    assert sequential["calibration"]["sequential"] is True


def test_sequential_without_a_calibration_is_refused(tmp_path):
    with pytest.raises(MlxSvdError, match="--sequential: scorer plain needs no calibration"):
        run("compress", *MODEL, "--rank", 4, "--scorer", "plain", "--sequential",
            "--mlx-path", tmp_path / "out")  # fmt: skip


def test_saved_plan_of_a_budget_is_repeated_exactly(calibration, tmp_path):
    first = tmp_path / "first"
    given = ("--calibration", calibration)
    run("compress", *MODEL, *given, "--keep-bytes", 0.5, "--mlx-path", first)
    again = json.loads(
        run("plan", *MODEL, *given, "--config", first / "mlx_svd_plan.json", "--json")
    )
    saved = json.loads((first / "mlx_svd_plan.json").read_text())
    assert again["bytes_after"] == saved["bytes_after"]
    for now, then in zip(again["projections"], saved["projections"], strict=True):
        for key in ("form", "ranks", "quantization", "factors"):
            assert now[key] == then[key], now["path"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--keep-bytes", 0.5, "--rank", 4), "chooses the ranks itself"),
        (("--keep-bytes", 0.5, "--target-bpw", 4), "contradictory"),
        (("--keep-bytes", 0), "above 0"),
        (("--keep-bytes", 1.5), "at most 1"),
        (("--target-size", "much"), "much"),
        (("--rank", 4, "--bits", "4"), "--bits"),
        (("--rank", 4, "--scorer", "best"), "best"),
        (("--preset", "crop"), "crop"),
        (("--rank", 4, "--allocation", "zero-sum"), "--keep-bytes"),
        (("--keep-bytes", 0.5, "--form", "magic"), "magic"),
        (("--keep-bytes", 0.5, "--bits", "7"), "bits"),
    ],
)
def test_contradictory_or_unknown_options_are_refused(options, words):
    with pytest.raises(MlxSvdError, match=words):
        run("plan", *MODEL, *options)


def test_calibration_and_text_together_are_refused(calibration):
    with pytest.raises(MlxSvdError, match="leave out --text"):
        run("plan", *MODEL, "--rank", 4, "--calibration", calibration, "--windows", 3)


def test_folder_without_calibration_is_refused(tmp_path):
    with pytest.raises(MlxSvdError, match="no finished calibration"):
        run("plan", *MODEL, "--rank", 4, "--calibration", tmp_path)


def test_unknown_moments_are_refused(tmp_path):
    with pytest.raises(MlxSvdError, match="--moments third"):
        run("calibrate", *MODEL, "--output", tmp_path / "c", "--moments", "third")
