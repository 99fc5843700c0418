"""Python programs of this package in a process of their own."""

import os
import sys
from pathlib import Path

import mlx_svd


def python_module(name: str) -> list[str]:
    """Command that runs a module; with :func:`child_environment`, of this very package and not of
    one that lies in the working directory."""
    return [sys.executable, "-P", "-m", name]


def child_environment() -> dict[str, str]:
    """This process's environment, with the folder of this package first on the path."""
    paths = [str(Path(mlx_svd.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
