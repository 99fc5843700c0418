"""The base model of a comparison: its results on the same rows."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.jobs.job import Record
from mlx_svd.evaluate.processes import Processes
from mlx_svd.evaluate.rows.read import read_jsonl
from mlx_svd.evaluate.settings import EvaluateSettings

# Of an evaluation, in its folder.
RESULTS_FILE = "results.json"


@dataclass
class Base:
    """folder: of its results, made by ``evaluate``; model: name or folder of the model, None if
    only its results were given; digest: of the model; processes: of this run, of which only the
    first has the folder."""

    folder: Path
    model: str | None
    digest: str
    processes: Processes

    def records(self, task: str, digest: str, doc_ids: Sequence[int]) -> dict[int, Record]:
        """doc_id -> record of these documents. Raises MlxSvdError if the base was asked other
        ones."""
        found = self.processes.from_first(lambda: self._read(task, digest, doc_ids))
        return {record["doc_id"]: record for record in found}

    def _read(self, task: str, digest: str, doc_ids: Sequence[int]) -> list[Record]:
        path = self.folder / f"samples_{task}.jsonl"
        hashes = read_results(self.folder)["data_hashes"]
        if task not in hashes or not path.is_file():
            raise MlxSvdError(
                f"{self.folder}: holds no results of {task}; evaluate the base model on it, or "
                "give --base the model"
            )
        if hashes[task] != digest:
            raise MlxSvdError(f"{path}: is about other rows; evaluate the base model on the same")
        records = {record["doc_id"]: record for _, record in read_jsonl(path)}
        missing = sorted(set(doc_ids) - records.keys())
        if missing:
            raise MlxSvdError(
                f"{path}: lacks document {missing[0]} and {len(missing) - 1} more; evaluate the "
                "base model with the same --limit"
            )
        return [records[i] for i in doc_ids]


def find_base(
    settings: EvaluateSettings,
    tasks: Sequence[str],
    output: Path,
    run: Callable[[str, Sequence[str], Path, EvaluateSettings], Any],
    processes: Processes,
) -> Base | None:
    """The base of a run: a folder with results as it is; a model is evaluated by ``run`` on
    ``tasks`` into OUTPUT/base/MODEL first, which continues like any evaluation."""
    if settings.base is None:
        return None
    given = Path(settings.base)
    if processes.from_first(lambda: (given / RESULTS_FILE).is_file()):
        digest = processes.from_first(lambda: read_results(given)["config"]["model_sha"])
        return Base(given, None, digest, processes)
    folder, digest = output / "base" / given.name, ""
    if tasks:
        results = run(settings.base, tasks, folder, replace(settings, base=None))
        digest = results["config"]["model_sha"]
    return Base(folder, settings.base, digest, processes)


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of an evaluation; MlxSvdError if it is none."""
    path = folder / RESULTS_FILE
    try:
        results = json.loads(path.read_bytes())
        if results["data_hashes"].keys() != results["results"].keys():
            raise ValueError("tasks without data hashes")
        return {"data_hashes": results["data_hashes"], "config": {**results["config"]}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MlxSvdError(
            f"{path}: is no result of mlx-svd evaluate; evaluate the base model again"
        ) from error
