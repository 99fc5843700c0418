"""The base model of a comparison: its results on the same rows."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.job import Record
from mlx_svd.evaluate.results import RESULTS_FILE
from mlx_svd.evaluate.rows import read_jsonl
from mlx_svd.evaluate.settings import EvaluateSettings


@dataclass
class Base:
    """folder: of its results, made by ``evaluate``; model: name or folder of the model, None if
    only its results were given."""

    folder: Path
    model: str | None
    _hashes: dict[str, str] = field(default_factory=dict)

    def records(self, task: str, digest: str, doc_ids: Sequence[int]) -> dict[int, Record]:
        """doc_id -> record of these documents. Raises MlxSvdError if the base was asked other
        ones."""
        path = self.folder / f"samples_{task}.jsonl"
        if not self._hashes:
            self._hashes = _results(self.folder)["data_hashes"]
        if task not in self._hashes or not path.is_file():
            raise MlxSvdError(
                f"{self.folder}: holds no results of {task}; evaluate the base model on it, or "
                "give --base the model"
            )
        if self._hashes[task] != digest:
            raise MlxSvdError(f"{path}: is about other rows; evaluate the base model on the same")
        records = {record["doc_id"]: record for _, record in read_jsonl(path)}
        missing = sorted(set(doc_ids) - records.keys())
        if missing:
            raise MlxSvdError(
                f"{path}: lacks document {missing[0]} and {len(missing) - 1} more; evaluate the "
                "base model with the same --limit"
            )
        return {i: records[i] for i in doc_ids}


def find_base(
    settings: EvaluateSettings,
    tasks: Sequence[str],
    output: Path,
    run: Callable[[str, Sequence[str], Path, EvaluateSettings], Any],
) -> Base | None:
    """The base of a run: a folder with results as it is; a model is evaluated by ``run`` on
    ``tasks`` into OUTPUT/base first, which continues like any evaluation."""
    if settings.base is None:
        return None
    given = Path(settings.base)
    if (given / RESULTS_FILE).is_file():
        return Base(given, None)
    folder = output / "base"
    if tasks:
        run(settings.base, tasks, folder, replace(settings, base=None))
    return Base(folder, settings.base)


def _results(folder: Path) -> dict[str, Any]:
    path = folder / RESULTS_FILE
    try:
        results = json.loads(path.read_bytes())
        return {"data_hashes": dict(results["data_hashes"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MlxSvdError(f"{path}: cannot be read; evaluate the base model again") from error
