"""Read a result folder: rows of every item, and the conditions they were measured under.

Written by ``mlx-svd evaluate`` or by lm-eval itself (``--log_samples``): samples_TASK.jsonl or
samples_TASK_DATE.jsonl beside results*.json, in the folder or in one folder below it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.statistics.pairing import Row
from mlx_svd.source.source import brief

_SAMPLES = re.compile(r"samples_(?P<task>.+?)(?:_(?P<date>\d{4}-?\d\d-?\d\dT[\d:.-]+))?\.jsonl")
# Keys of results.json that identify data, where both runs have them.
_HASHES = ("task_hashes", "data_hashes", "data_hash")


@dataclass(frozen=True)
class Run:
    """folder: as given; tasks: task -> rows; results: the keys of results.json, those by task
    merged over its files, the newest first; notes: what a reader must know."""

    folder: Path
    tasks: dict[str, list[Row]]
    results: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> str:
        """Name of the model, or the folder's."""
        return str(self.results.get("model_name") or self.folder)

    def of_task(self, key: str, task: str) -> Any:
        """results[key][task], None where there is none."""
        entry = self.results.get(key)
        return entry.get(task) if isinstance(entry, dict) else None

    def condition(self, key: str) -> Any:
        """results["config"][key], None where there is none."""
        config = self.results.get("config")
        return config.get(key) if isinstance(config, dict) else None

    def setting(self, task: str, key: str) -> Any:
        """What a task was run with: its own settings (mlx-svd), else those of the whole run."""
        whole = self.condition("settings") or {}
        whole = {**whole, "seed": self.condition("fewshot_seed")}
        return (self.of_task("task_settings", task) or whole).get(key)

    def chance(self, task: str, metric: str) -> float | None:
        """What guessing gives, where the run says it (mlx-svd's "intervals")."""
        entry = (self.of_task("intervals", task) or {}).get(metric) or {}
        return entry.get("chance")

    def data_hash(self, task: str) -> str | None:
        """What identifies the data of a task, None if the run did not keep it."""
        hashes = (self.of_task(key, task) for key in _HASHES)
        return next((str(h) for h in hashes if h), None)


def read_run(folder: str | Path) -> Run:
    """Read all tasks of a result folder. Raises MlxSvdError naming the folder if it holds none, if
    those of several models, or no results.json (the run did not finish), and naming file and line
    for what is no row."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise MlxSvdError(f"{folder}: no such folder; give one written by mlx-svd evaluate")
    place = _place(folder)
    files, notes = _newest(place)
    results = _results(place)
    tasks = {task: list(_rows(path, task)) for task, path in sorted(files.items())}
    _check_complete(place, tasks, results)
    return Run(folder, tasks, results, notes)


def _check_complete(place: Path, tasks: dict[str, list[Row]], results: dict[str, Any]) -> None:
    """A run of mlx-svd that was killed leaves rows that its results.json does not count yet."""
    if results.get("model_source") != "mlx-svd":
        return
    counts = results.get("n-samples", {})
    for task, rows in tasks.items():
        expected = counts.get(task, {}).get("effective")
        if expected != len(rows):
            raise MlxSvdError(
                f"{place}: holds {len(rows)} rows of {task}, results.json counts "
                f"{expected or 'none'}: that run did not finish; repeat the command, which "
                "continues it"
            )


def _place(folder: Path) -> Path:
    """The folder itself, or the one below it, that holds samples."""
    places = {p.parent for pattern in ("", "*/") for p in folder.glob(f"{pattern}samples_*.jsonl")}
    if not places:
        raise MlxSvdError(
            f"{folder}: holds no samples_*.jsonl; give a folder written by mlx-svd evaluate, or by "
            "lm-eval with --log_samples"
        )
    if len(places) > 1:
        names = ", ".join(sorted(str(p) for p in places))
        raise MlxSvdError(f"{folder}: holds several runs ({names}); give one of these folders")
    return places.pop()


def _newest(place: Path) -> tuple[dict[str, Path], list[str]]:
    """(task -> its newest file, remarks on older ones)."""
    found: dict[str, list[tuple[str, Path]]] = {}
    for path in place.glob("samples_*.jsonl"):
        own = path.stem.removeprefix("samples_")
        if (place / f"conditions_{own}.json").is_file():
            # mlx-svd's, whose name holds no date, whatever it looks like.
            found.setdefault(own, []).append(("", path))
        elif match := _SAMPLES.fullmatch(path.name):
            found.setdefault(match["task"], []).append((match["date"] or "", path))
    notes = [
        f"{place}: {len(files)} runs of {task}; the newest was read: {max(files)[1].name}"
        for task, files in sorted(found.items())
        if len(files) > 1
    ]
    return {task: max(files)[1] for task, files in found.items()}, notes


def _results(place: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    files = sorted(place.glob("results*.json"))
    if not files:
        raise MlxSvdError(
            f"{place}: holds samples but no results*.json: the run did not finish; repeat the "
            "command, which continues it"
        )
    for path in files:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise MlxSvdError(f"{path}: cannot be read as JSON: {brief(error)}") from error
        if not isinstance(content, dict):
            raise MlxSvdError(f"{path}: is no JSON object; give lm-eval's results")
        for key, value in content.items():
            known = merged.get(key)
            both = isinstance(known, dict) and isinstance(value, dict)
            merged[key] = {**known, **value} if both else value
    return merged


def _rows(path: Path, task: str) -> Iterator[Row]:
    count = 0
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise MlxSvdError(f"{path}: cannot be read as text: {brief(error)}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MlxSvdError(
                f"{path}: line {number} is not JSON (a run that was killed?); repeat the run"
            ) from error
        if not isinstance(row, dict) or not ("id" in row or "doc_id" in row):
            raise MlxSvdError(f'{path}: line {number} has neither "id" nor "doc_id"')
        if row.get("task", task) != task:
            raise MlxSvdError(f"{path}: line {number} belongs to the task {row['task']!r}")
        count += 1
        yield row
    if not count:
        raise MlxSvdError(f"{path}: holds no rows; repeat the run")
