"""Where an experiment finds its data, and what identifies it."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlx_svd.calibrate.statistics import model_digest
from mlx_svd.errors import MlxSvdError
from mlx_svd.source.source import open_source


@dataclass(frozen=True)
class Places:
    """data_dir: what paths in the file start from; shared: folder of what several runs need
    (calibrations, trained models); model: in place of the file's, None = the file's; limit: of
    facts, windows of each text and rows of each task, None = as the file says."""

    data_dir: Path
    shared: Path
    model: str | None = None
    limit: int | None = None

    def file(self, name: str) -> Path:
        """A file of the data; MlxSvdError if it is not there."""
        path = self.data_dir / name
        if not path.is_file():
            raise MlxSvdError(f"{path}: no such file; give the folder that holds it as --data-dir")
        return path

    def model_name(self, name: str) -> str:
        """A folder of the data, else the name of a model as it is."""
        path = self.data_dir / name
        return str(path) if path.is_dir() else name

    def limited(self, count: int | None) -> int | None:
        """The smaller one of a count and the limit."""
        given = [n for n in (count, self.limit) if n is not None]
        return min(given) if given else None


def check_keys(where: str, given: dict[str, Any], known: set[str]) -> None:
    """Raise MlxSvdError that names a key which is not known."""
    if not isinstance(given, dict):
        raise MlxSvdError(f"{where}: give a mapping with {', '.join(sorted(known))}")
    for key in given:
        if key not in known:
            raise MlxSvdError(f"{where}: unknown key {key!r}; use {', '.join(sorted(known))}")


@lru_cache(maxsize=256)
def file_digest(path: Path) -> str:
    """SHA-256 of a file, read once in a process."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@lru_cache(maxsize=64)
def digest_of_model(name: str) -> str:
    """Digest of a model's config and weights, read once in a process."""
    return model_digest(open_source(name))
