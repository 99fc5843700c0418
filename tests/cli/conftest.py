"""The command, called in this process."""

import sys

import pytest

from mlx_svd.cli.app import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Arguments -> (exit code, stdout, stderr), in this process."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlx-svd", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out = capsys.readouterr()
        return stop.value.code or 0, out.out, out.err

    return call
