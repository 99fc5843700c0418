"""A task of one's own."""

import pytest

from tests.evaluate.capitals import choice_rows, write


@pytest.fixture
def capitals(tmp_path):
    return write(tmp_path / "capitals.jsonl", choice_rows())
