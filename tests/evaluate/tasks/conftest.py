"""Local rows of the tasks that need no multiple choice, and the demo model."""

import json

import pytest

from mlx_svd.checkpoint.loader import load
from mlx_svd.demo import DEMO_MODEL
from tests.evaluate.tasks.material import FACTS


@pytest.fixture(scope="module")
def demo():
    return load(DEMO_MODEL, dtype="float32")


@pytest.fixture
def data(tmp_path, shared):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "facts.json").write_text(json.dumps(FACTS))
    text = (shared / "data/text/wikitext-2.test.txt").read_text()[:9000]
    (folder / "wikitext-2.test.txt").write_text(text)
    messages = [
        {"role": "user", "content": "Where do you live?"},
        {"role": "assistant", "content": "I live in a small house near the sea."},
        {"role": "user", "content": "Alone?"},
        {"role": "assistant", "content": "No, my mother lives with me."},
    ]
    line = json.dumps({"messages": messages})
    (folder / "conversations.jsonl").write_text(f"{line}\n{line.replace('sea', 'lake')}\n")
    return folder
