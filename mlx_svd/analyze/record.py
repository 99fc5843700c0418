"""The JSON file of an analysis, which tables and plots are made from."""

import json
import math
from pathlib import Path
from typing import Any

from mlx_svd.checkpoint.disk import disk_errors, replace_file
from mlx_svd.errors import MlxSvdError

ANALYSES = ("spectrum", "layers", "cliff", "depth")


def check_output(path: Path) -> None:
    """Raise MlxSvdError, before any work is done, for a file that is no JSON file's name."""
    if path.suffix != ".json" or path.is_dir():
        raise MlxSvdError(f"--output {path}: give a file that ends in .json")


def save_analysis(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write a result; it appears when it is complete. Returned as it can be read again: without
    limits that JSON has no number for (an interval from one window), which become null."""
    readable = _finite(result)
    with disk_errors(path.parent, "--output"):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(readable, indent=1, allow_nan=False).encode())
    return readable


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


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
