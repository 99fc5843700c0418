"""The conditions of a result."""

import json
import sys

from mlx_svd.conditions import command_line, conditions


def test_the_command_names_local_files_without_their_folders(monkeypatch):
    words = ["mlx-svd", "compress", "--model", "/home/me/m", "--text=../a b.txt", "--rank", "8"]
    monkeypatch.setattr(sys, "argv", words)
    assert command_line() == "mlx-svd compress --model m '--text=a b.txt' --rank 8"


def test_conditions_are_json_and_name_the_versions_that_numbers_depend_on():
    found = json.loads(json.dumps(conditions()))
    assert {"mlx-svd", "mlx", "mlx-lm", "numpy"} <= found["versions_of_packages"].keys()
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
