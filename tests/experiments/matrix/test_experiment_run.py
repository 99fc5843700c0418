"""Running an experiment: records, resuming, cost, several processes."""

import json

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.matrix import run as run_module
from mlx_svd.experiments.matrix.config import load_experiment
from mlx_svd.experiments.matrix.places import Places
from mlx_svd.experiments.matrix.run import experiment_status, run_experiment

CONDITIONS = [
    {"name": "dense"},
    {"name": "plain", "steps": [{"truncate": {"projections": "q,k,o", "rank_ratio": 0.3}}]},
    {"name": "noise", "steps": [{"noise": {"projections": "q,k,o", "rank_ratio": 0.3}}]},
    {"name": "broken", "steps": [{"truncate": {"layers": [99], "rank_ratio": 0.3}}]},
]


@pytest.fixture
def experiment(experiment_file):
    return load_experiment(experiment_file(CONDITIONS, baseline="dense", seconds_per_run=7))


def values(results) -> dict:
    return {(c["condition"], c["metric"]): c["value"] for c in results["cells"]}


def test_a_run_is_recorded_and_continued(experiment, places, tmp_path, monkeypatch):
    output = tmp_path / "out"
    before = experiment_status(experiment, output, places)
    assert not output.exists(), "a dry run writes nothing"
    # Plain truncation has nothing random: one run, whatever the seeds.
    assert [job.seed for job in before.jobs] == [None, None, 0, 1, None]
    assert (before.seconds, before.guessed) == (35, 5)

    labels = []
    results = run_experiment(
        experiment, output, places, advance=lambda label, done, total: labels.append(label)
    )
    assert labels == ["dense", "plain", "noise, seed 0", "noise, seed 1", "broken"]
    (failed,) = results["failed"]
    assert failed["condition"] == "broken"
    assert "layers 0 to 1" in failed["reason"]
    assert values(results)["dense", "perplexity"] < values(results)["plain", "perplexity"]
    record = json.loads((output / "records" / "noise.seed-1.json").read_bytes())
    assert record["seed"] == 1
    assert record["conditions"]["versions_of_packages"]["mlx-svd"] == record["version"]
    assert len(record["metrics"]["facts"]["items"]) == 9
    assert record["numbers"]["bytes"] == record["numbers"]["bytes_before"]

    # One record is lost: only that run is made again, and the results are the same.
    (output / "records" / "noise.seed-1.json").unlink()
    after = experiment_status(experiment, output, places)
    assert [job.label for job in after.missing] == ["noise, seed 1"]
    assert after.guessed == 0
    labels.clear()
    again = run_experiment(
        experiment, output, places, advance=lambda label, done, total: labels.append((done, total))
    )
    assert labels == [(5, 5)]
    assert values(again) == values(results)
    assert json.loads((output / "results.json").read_bytes())["cells"] == again["cells"]

    # Nothing is left to do, so no model is loaded.
    monkeypatch.setattr(run_module, "run_job", None)
    assert values(run_experiment(experiment, output, places)) == values(results)


def test_records_of_other_data_or_another_limit_are_not_taken(experiment, places, tmp_path):
    run_experiment(experiment, tmp_path / "out", places, seeds=1)
    limited = Places(places.data_dir, places.shared, limit=2)
    status = experiment_status(experiment, tmp_path / "out", limited, seeds=1)
    assert len(status.missing) == len(status.jobs) == 4
    results = run_experiment(experiment, tmp_path / "out", limited, seeds=1)
    assert {c["items"] for c in results["cells"]} == {2}


def test_several_processes_give_the_same_records(experiment, places, tmp_path):
    one = run_experiment(experiment, tmp_path / "one", places)
    two = run_experiment(experiment, tmp_path / "two", places, workers=2)
    assert two["cells"] == one["cells"]
    assert two["comparisons"] == one["comparisons"]


def test_wrong_settings_are_refused_before_anything_runs(experiment_file, places, tmp_path):
    path = experiment_file([{"name": "a", "steps": [{"shrink": {}}]}])
    with pytest.raises(MlxSvdError, match="condition 'a': step"):
        run_experiment(load_experiment(path), tmp_path / "out", places)
    path = experiment_file([{"name": "a"}], kind="alchemy")
    with pytest.raises(MlxSvdError, match="alchemy"):
        run_experiment(load_experiment(path), tmp_path / "out", places)
    path = experiment_file([{"name": "a"}], settings={"model": "tiny", "facts": {"file": "no"}})
    with pytest.raises(MlxSvdError, match="--data-dir"):
        run_experiment(load_experiment(path), tmp_path / "out", places)
    experiment = load_experiment(experiment_file([{"name": "a"}]))
    with pytest.raises(MlxSvdError, match="--workers 0"):
        run_experiment(experiment, tmp_path / "out", places, workers=0)
    with pytest.raises(MlxSvdError, match="--seeds 0"):
        run_experiment(experiment, tmp_path / "out", places, seeds=0)
