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
_OF_TASKS = ("data_hashes", "task_settings")


@dataclass
class Base:
    """folder: of its results, made by ``evaluate``; model: name or folder of the model, None if
    only its results were given; digest: of the model; processes: of this run, of which only the
    first has the folder."""

    folder: Path
    model: str | None
    digest: str
    processes: Processes

    def records(
        self,
        task: str,
        digest: str,
        doc_ids: Sequence[int],
        settings: EvaluateSettings,
        context: int,
    ) -> dict[int, Record]:
        """doc_id -> record of these documents. settings: with num_fewshot as it is for this task;
        context: tokens of it. Raises MlxSvdError if the base was asked other ones, or in another
        way."""

        def read() -> list[Record]:
            results = read_results(self.folder)
            found = self._read(task, digest, doc_ids, results["data_hashes"])
            self._check_settings(task, results["task_settings"][task], settings, context)
            return found

        return {record["doc_id"]: record for record in self.processes.from_first(read)}

    def _read(
        self, task: str, digest: str, doc_ids: Sequence[int], hashes: dict[str, str]
    ) -> list[Record]:
        path = self.folder / f"samples_{task}.jsonl"
        if task not in hashes or not path.is_file():
            raise MlxSvdError(
                f"{self.folder}: holds no results of {task}; evaluate the base model on it, or "
                "give --base the model"
            )
        if hashes[task] != digest:
            raise MlxSvdError(f"{path}: is about other rows; evaluate the base model on the same")
        records: dict[int, Record] = {}
        for where, record in read_jsonl(path):
            if not isinstance(record.get("doc_id"), int) or record.get("acc") not in (0, 1):
                raise MlxSvdError(
                    f'{where} has no number in "doc_id" or "acc"; evaluate the base model again'
                )
            records[record["doc_id"]] = record
        missing = sorted(set(doc_ids) - records.keys())
        if missing:
            raise MlxSvdError(
                f"{path}: lacks document {missing[0]} and {len(missing) - 1} more; evaluate the "
                "base model with the same --limit"
            )
        return [records[i] for i in doc_ids]

    def _check_settings(
        self, task: str, before: dict[str, Any], settings: EvaluateSettings, context: int
    ) -> None:
        now = {"num_fewshot": settings.num_fewshot}
        if settings.num_fewshot:
            now["seed"] = settings.seed
        # Without the option both have the context of their model, however long that is.
        if before.get("max_length") or settings.max_length:
            before, now["max_length"] = {**before, "max_length": before.get("context")}, context
        for key, value in now.items():
            if before.get(key) != value:
                option = "--" + key.replace("_", "-")
                raise MlxSvdError(
                    f"{self.folder}: {task} was evaluated with {option} {before.get(key)}, now "
                    f"{value}; evaluate the base model in the same way"
                )


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
    if processes.from_first(lambda: holds_results(given)):
        digest = processes.from_first(lambda: read_results(given)["config"]["model_sha"])
        return Base(given, None, digest, processes)
    if given.is_dir() and not (given / "config.json").is_file():
        raise MlxSvdError(
            f"--base {given}: holds neither {RESULTS_FILE} of an evaluation nor a model's "
            "config.json; give one of both"
        )
    # A folder may be given as "..".
    name = given.resolve().name if given.is_dir() else given.name
    folder, digest = output / "base" / name, ""
    if tasks:
        results = run(settings.base, tasks, folder, replace(settings, base=None))
        digest = results["config"]["model_sha"]
    return Base(folder, settings.base, digest, processes)


def holds_results(folder: Path) -> bool:
    """Whether the folder holds results of an evaluation."""
    return (folder / RESULTS_FILE).is_file()


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of an evaluation; MlxSvdError if it is none."""
    path = folder / RESULTS_FILE
    try:
        results = json.loads(path.read_bytes())
        for key in _OF_TASKS:
            if results[key].keys() != results["results"].keys():
                raise ValueError(f"tasks without {key}")
        return {key: results[key] for key in _OF_TASKS} | {"config": {**results["config"]}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MlxSvdError(
            f"{path}: is no result of mlx-svd evaluate; evaluate the base model again"
        ) from error
