"""A data folder with a tiny model, a text and a few facts."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from mlx_svd.demo import DEMO_MODEL
from mlx_svd.experiments.matrix.places import Places
from tests.experiments.matrix.capitals import SETTINGS, capitals


@pytest.fixture(scope="session")
def data(tmp_path_factory, tiny) -> Path:
    """tiny (a random llama), text.txt, facts.json."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(DEMO_MODEL.with_name("passage.txt").read_text())
    (folder / "facts.json").write_text(json.dumps(capitals()))
    shutil.copytree(tiny(), folder / "tiny")
    return folder


@pytest.fixture
def places(data, tmp_path) -> Places:
    return Places(data, tmp_path / "shared")


@pytest.fixture
def experiment_file(tmp_path):
    """(conditions, other keys) -> a YAML file of kind compression."""

    def write(conditions, **changes) -> Path:
        content = {
            "title": "a test",
            "kind": "compression",
            "primary": "facts",
            "seeds": [0, 1],
            "settings": SETTINGS,
            "conditions": conditions,
            **changes,
        }
        path = tmp_path / "trial.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write
