"""The JSON file of an analysis, which tables and plots are made from."""

import json
from pathlib import Path
from typing import Any

from mlx_svd.checkpoint.disk import disk_errors, replace_file
from mlx_svd.errors import MlxSvdError
from mlx_svd.strict_json import finite

ANALYSES = ("spectrum", "layers", "cliff", "depth")


def check_output(path: Path) -> None:
    """Raise MlxSvdError, before any work is done, for a file that is no JSON file's name."""
    if path.suffix != ".json" or path.is_dir():
        raise MlxSvdError(f"--output {path}: give a file that ends in .json")


def save_analysis(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write a result; it appears when it is complete. Returned as it can be read again: without
    limits that JSON has no number for (an interval from one window), which become null."""
    text = json.dumps(finite(result), indent=1, allow_nan=False)
    with disk_errors(path.parent, "--output"):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())
    return json.loads(text)


def load_analysis(path: Path) -> dict[str, Any]:
    """Read a saved result. Raises MlxSvdError for a file that is none."""
    try:
        result = json.loads(path.read_bytes())
        kind = result["analysis"]
    except OSError as error:
        raise MlxSvdError(
            f"{path}: cannot be read ({error.strerror}); give a saved analysis"
        ) from (error)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MlxSvdError(f"{path}: is no result of mlx-svd analyze; make it again") from error
    if kind not in ANALYSES:
        raise MlxSvdError(f"{path}: analysis {kind!r} is unknown; made by a newer mlx-svd")
    return result
