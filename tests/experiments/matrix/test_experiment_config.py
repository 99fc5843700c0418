"""Experiment files: grids, and what is refused by name."""

from pathlib import Path

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.matrix.config import Comparison, expanded, load_experiment
from mlx_svd.experiments.matrix.kinds import KINDS, make_kind
from mlx_svd.experiments.matrix.places import Places

FILES = sorted((Path(__file__).parents[3] / "configs" / "experiments").glob("*.yaml"))


def test_a_grid_is_every_combination_and_keeps_the_type_of_a_value_that_stands_alone():
    entry = {"grid": {"r": [0.5, 1], "s": ["x", "y"]}, "name": "{s} {r}", "deep": [{"r": "{r}"}]}
    found = expanded(entry)
    assert [e["name"] for e in found] == ["x 0.5", "y 0.5", "x 1", "y 1"]
    assert found[0]["deep"] == [{"r": 0.5}]


def test_every_condition_is_compared_with_its_baseline_once(experiment_file):
    conditions = [{"name": "a"}, {"name": "b"}, {"name": "c", "baseline": "b"}]
    path = experiment_file(conditions, baseline="a", comparisons=[{"a": "b", "b": "c"}])
    assert load_experiment(path).pairs == (Comparison("a", "b"), Comparison("b", "c"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speling": 1}, "speling"),
        ({"conditions": [{"name": "a"}, {"name": "a"}]}, "'a': the name is given twice"),
        ({"conditions": []}, "needs conditions"),
        ({"baseline": "nobody"}, "nobody"),
        ({"comparisons": [{"a": "a", "b": "zz"}]}, "'zz' is no condition"),
        ({"seeds": [1, 1]}, "none twice"),
        ({"verdicts": [[0.1, "x"]]}, "null with the last"),
        ({"primary": None, "conditions": [{"steps": []}]}, "name"),
    ],
)
def test_a_wrong_file_is_refused_by_name(changes, words, experiment_file):
    changes = dict(changes)
    path = experiment_file(changes.pop("conditions", [{"name": "a"}]), **changes)
    with pytest.raises(MlxSvdError, match=words) as error:
        load_experiment(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_of_the_seeds_have_settings_that_make_sense(file, shared, tmp_path):
    experiment = load_experiment(file)
    assert experiment.kind in KINDS
    kind = make_kind(experiment, Places(shared, tmp_path))
    for condition in experiment.conditions:
        kind.check(condition.settings)
    assert any(kind.seeded(c.settings) for c in experiment.conditions)


def test_there_is_a_file_for_every_experiment_of_seed_004():
    names = {file.stem.removeprefix("seed-004-") for file in FILES}
    wanted = {"exp-01", "exp-02", "exp-03", "exp-04", "scale-test", "exp-05", "exp-06", "exp-11"}
    wanted |= {"exp-18", "exp-21", "final-a", "final-b", "final-c", "final-d"}
    assert {w for w in wanted if any(name.startswith(w) for name in names)} == wanted
