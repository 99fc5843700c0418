"""A result folder: of one model and dtype, and of one run at a time."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlx_svd.checkpoint.disk import disk_errors
from mlx_svd.errors import MlxSvdError

REMEDY = "give another --output-dir, or remove this folder"


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other runs out of it; a new one that stays empty goes away again.
    Raises MlxSvdError if another run writes there."""
    if folder.exists() and not folder.is_dir():
        raise MlxSvdError(f"--output-dir {folder}: is a file; give a folder")
    new = not folder.exists()
    with disk_errors(folder, "--output-dir"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MlxSvdError(
                f"{folder}: another run of mlx-svd evaluate writes here; wait for it, or give "
                "another --output-dir"
            ) from error
        except OSError:
            pass  # Some network disks have no locks; everything else works there.
        yield
    finally:
        os.close(descriptor)
        if new:
            with suppress(OSError):  # It is not empty.
                folder.rmdir()


def check_folder(folder: Path, model: str, dtype: str | None) -> None:
    """Raise MlxSvdError if the folder holds records of another model (its digest) or dtype: its
    results.json can name one only."""
    for path in sorted(folder.glob("conditions_*.json")):
        before = read_conditions(path)
        if before.get("model") != model:
            raise MlxSvdError(f"{path}: is of another model; {REMEDY}")
        if before.get("dtype") != dtype:
            changed = values(before.get("dtype"), dtype)
            raise MlxSvdError(f"{path}: was begun with another dtype{changed}; {REMEDY}")


def read_conditions(path: Path) -> dict[str, Any]:
    """What a task's records in the folder depend on (conditions_TASK.json)."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise MlxSvdError(f"{path}: cannot be read; {REMEDY}") from error
    if not isinstance(found, dict):
        raise MlxSvdError(f"{path}: holds no conditions; {REMEDY}")
    return found


def values(before: Any, now: Any) -> str:
    """Both values, unless they are digests, which tell nobody anything."""
    if any(isinstance(value, str) and len(value) == 64 for value in (before, now)):
        return ""
    return f" ({before!r}, now {now!r})"
