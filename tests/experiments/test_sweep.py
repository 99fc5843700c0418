"""A sweep on the embedded model: rows at equal bytes, resumable, failures said."""

import json
from pathlib import Path

import pytest
import yaml

from mlx_svd.calibrate.statistics import load_calibration
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments import sweep_rows
from mlx_svd.experiments.cost import plan_cost
from mlx_svd.experiments.methods import method_recipe
from mlx_svd.experiments.sweep import sweep
from mlx_svd.experiments.sweep_config import load_sweep_config
from mlx_svd.experiments.sweep_table import markdown, write_tables
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.recipe import Recipe
from mlx_svd.plan.recipe_file import load_recipe_fields
from mlx_svd.source.source import open_source

TEXT = "text.txt"
CONFIG = {
    "calibration": {"text": TEXT, "windows": 4, "length": 64},
    "heldout": {"text": TEXT, "windows": 3, "length": 64},
    "groups": [
        {
            "name": "q/k/o",
            "projections": "q,k,o",
            "keep_bytes": [0.7],
            "bits": 16,
            "methods": ["plain", "pivot+two-sided", "budget", "budget sequential"],
        },
        {"name": "k", "projections": "k", "keep_bytes": [0.001], "methods": ["budget"]},
    ],
    "speed": True,
    "rivals": ["q4"],
    "matched": ["q4"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    passage = DEMO_MODEL.with_name("passage.txt").read_text()
    (folder / TEXT).write_text(passage)
    return folder


def config_file(folder: Path, **changes) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


@pytest.fixture(scope="module")
def done(data, tmp_path_factory) -> tuple[Path, list[dict]]:
    output = tmp_path_factory.mktemp("sweep") / "out"
    config = load_sweep_config(config_file(data))
    return output, sweep(str(DEMO_MODEL), config, output, data)


def test_rows_keep_at_most_their_share_of_the_bytes_and_the_dense_model_is_first(done):
    _, records = done
    assert records[0]["name"] == "dense"
    assert records[0]["texts"]["heldout"]["ratio"] == [1.0, 1.0, 1.0]
    for record in records[1:5]:
        assert 0.65 < record["touched_bytes"] / record["touched_before"] <= 0.7
        assert record["texts"]["heldout"]["perplexity"][0] > 1
        assert record["kl"][0] > 0
        assert record["decode_speed"] > 0


def test_a_sequential_row_has_the_bytes_of_its_plan_and_other_weights(done):
    _, records = done
    plain, sequential = records[3:5]
    assert sequential["name"].endswith("budget sequential")
    assert sequential["forms"] == plain["forms"]
    assert sequential["total_bytes"] == plain["total_bytes"]
    assert sequential["kl"] != plain["kl"]


def test_the_cost_of_calibrating_and_planning_is_in_the_table(done):
    _, records = done
    for cost in (records[0]["plan"], records[0]["calibration"]):
        assert cost["cpu_seconds"] > 0
        assert cost["peak_memory"] > 50e6
    assert "A plan of all projections" in markdown(records)


def test_a_plan_that_fails_is_told_in_its_own_words(tmp_path):
    with pytest.raises(MlxSvdError, match=r"mlx-svd plan failed: .*no finished calibration"):
        plan_cost(DEMO_MODEL, tmp_path)


def test_a_budget_out_of_reach_is_a_row_with_its_reason(done):
    _, records = done
    assert "can be reached" in records[5]["reason"]
    assert "did not run" in markdown(records)


def test_a_recipe_file_beside_the_sweeps_is_a_row_with_the_bytes_of_its_plan(data, tmp_path):
    recipe = tmp_path / "eight.yaml"
    recipe.write_text("projections: [q, k, o]\nrank_ratio: 0.7\nquantize: {bits: 8}\n")
    path = config_file(tmp_path, groups=[], rivals=[], matched=[], recipes=[recipe.name])
    records = sweep(str(DEMO_MODEL), load_sweep_config(path), tmp_path / "out", data)
    assert [r["name"] for r in records] == ["dense", "recipe eight"]
    fields = load_recipe_fields(recipe)
    calibration = load_calibration(tmp_path / "out" / "calibration")
    plan = make_plan(open_source(str(DEMO_MODEL)), Recipe(**fields), calibration=calibration)
    assert records[1]["total_bytes"] == plan.bytes_after
    assert records[1]["texts"]["heldout"]["ratio"][0] > 1
    recipe.write_text(recipe.read_text().replace("0.7", "0.3"))
    other = sweep(str(DEMO_MODEL), load_sweep_config(path), tmp_path / "out", data)[1]
    assert other["total_bytes"] < records[1]["total_bytes"]


def test_budget_at_a_rivals_bytes_is_no_larger_than_the_rival(done):
    _, records = done
    rival, ours = records[6], records[7]
    assert rival["name"] == "mlx-lm q4"
    assert ours["total_bytes"] <= rival["total_bytes"]


def test_finished_rows_are_not_run_again(done, data, monkeypatch):
    output, records = done
    monkeypatch.setattr(sweep_rows, "make_plan", None)
    monkeypatch.setattr(sweep_rows, "make_rival", None)
    again = sweep(str(DEMO_MODEL), load_sweep_config(config_file(data)), output, data)
    assert again == records


def test_tables_hold_every_row(done, tmp_path):
    _, records = done
    write_tables(records, tmp_path)
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == len(records) + 1
    assert json.loads((tmp_path / "sweep.json").read_text()) == records


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"groups": [{**CONFIG["groups"][0], "methods": ["magic"]}]}, "magic"),
        ({"rivals": ["q7"]}, "q7"),
        ({"matched": ["q3"]}, "q3"),
        ({"speling": 1}, "speling"),
        ({"groups": [], "rivals": [], "matched": []}, "groups, rivals or recipes"),
        ({"recipes": ["none.yaml"]}, "none.yaml"),
        ({"calibration": {}}, "text"),
        ({"groups": [{"name": "a"}]}, "methods"),
        ({"heal": {"lr": -1}}, "lr"),
    ],
)
def test_wrong_sweep_file_is_refused_by_name(changes, words, tmp_path):
    path = config_file(tmp_path, **changes)
    with pytest.raises(MlxSvdError, match=words) as error:
        load_sweep_config(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("method", "bits"), [("nearest", 4), ("compensated", 4)])
def test_uniform_quantization_takes_the_most_bits_that_fit(method, bits):
    source = open_source(str(DEMO_MODEL))
    recipe = method_recipe(method, source, ("q", "k", "o"), 0.281, None)
    assert {rule.bits for rule in recipe.rules} == {bits}


def test_correction_fills_the_bytes_of_the_next_bits():
    source = open_source(str(DEMO_MODEL))
    recipe = method_recipe("corrected", source, ("q", "k", "o"), 0.281, None)
    assert {rule.exact[0].bits for rule in recipe.rules} == {3}


def test_uniform_share_is_kept_by_every_projection():
    source = open_source(str(DEMO_MODEL))
    plan = make_plan(source, method_recipe("plain", source, ("q", "k", "o"), 0.5, "16"))
    for p in plan.projections:
        if p.projection.name in ("q", "k", "o"):
            assert p.form == "factored"
            assert 0.45 * p.bytes_before < p.bytes_after <= 0.5 * p.bytes_before


def test_shipped_sweep_files_are_valid():
    files = sorted((Path(__file__).parents[2] / "configs" / "sweeps").glob("*.yaml"))
    assert files
    for path in files:
        load_sweep_config(path)
