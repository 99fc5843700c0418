"""Where the rows of a task come from: a local folder, a file of one's own, or the hub."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.rows.choice_task import ChoiceTask
from mlx_svd.evaluate.rows.hub import hub_rows
from mlx_svd.evaluate.rows.read import Row, digest, read_jsonl
from mlx_svd.evaluate.settings import EvaluateSettings


@dataclass(frozen=True)
class Material:
    """rows: those asked for, with their numbers in the whole set (doc_ids); pool: rows to draw
    examples from; own: the pool is the set itself; total: rows of the set; origin: file or hub
    name; digest: SHA-256 of rows and pool."""

    rows: list[Row]
    doc_ids: list[int]
    pool: list[Row]
    own: bool
    total: int
    origin: str
    digest: str


def choice_material(task: ChoiceTask, settings: EvaluateSettings) -> Material:
    """Rows and examples of a task. Raises MlxSvdError naming what is missing."""
    if settings.data_dir is None:
        rows = _from_hub(task, task.hub.split)
        wanted = settings.num_fewshot and task.fixed_shots is None and task.hub.shots
        pool = _from_hub(task, task.hub.shots) if wanted else []
        return _material(rows, pool or rows, settings, f"{task.hub.repo}:{task.hub.split}")
    path = find_file(settings.data_dir, task.file)
    rows = read_file(path, task.parse)
    pool = rows
    if task.shots_file:
        pool = read_file(find_file(settings.data_dir, task.shots_file), task.parse)
    return _material(rows, pool, settings, path.name)


def file_material(
    path: Path, parse: Callable[[str, dict[str, Any], int], Row], settings: EvaluateSettings
) -> Material:
    """Rows of a user's own file."""
    rows = read_file(path, parse)
    return _material(rows, rows, settings, path.name)


def find_file(folder: Path, name: str) -> Path:
    """The file in the folder, or in a folder right below it. Raises MlxSvdError if there is none,
    or if there are several."""
    found = [p for p in (folder / name, *sorted(folder.glob(f"*/{name}"))) if p.is_file()]
    if not found:
        raise MlxSvdError(
            f"{folder / name}: no such file; put the rows there or leave out --data-dir to fetch "
            "them from the hub"
        )
    return found[0]


def read_file(path: Path, parse: Callable[[str, dict[str, Any], int], Row]) -> list[Row]:
    """All rows of a JSON-lines file."""
    lines = enumerate(read_jsonl(path))
    return [parse(where, entry, number) for number, (where, entry) in lines]


def pick(total: int, settings: EvaluateSettings) -> list[int]:
    """Numbers of the rows that are asked for, ascending: the first ones, or drawn by the seed."""
    if settings.limit is None or settings.limit >= total:
        return list(range(total))
    if settings.random_rows:
        return sorted(random.Random(settings.seed).sample(range(total), settings.limit))
    return list(range(settings.limit))


def _from_hub(task: ChoiceTask, split: str) -> list[Row]:
    where = f"{task.hub.repo}:{split}"
    return [
        task.parse(f"{where} row {number}", task.from_hub(entry), number)
        for number, entry in enumerate(hub_rows(task.hub, split))
    ]


def _check_ids(rows: list[Row]) -> None:
    """Raise MlxSvdError for an id given twice: comparisons pair items by their ids."""
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise MlxSvdError(
                f"{row.where}: the id {row.id!r} is given twice; rename one, or leave out all ids"
            )
        seen.add(row.id)


def _material(
    rows: list[Row], pool: list[Row], settings: EvaluateSettings, origin: str
) -> Material:
    _check_ids(rows)
    chosen = pick(len(rows), settings)
    own = pool is rows
    content = digest(rows) if own else digest([*rows, *pool])
    return Material([rows[i] for i in chosen], chosen, pool, own, len(rows), origin, content)
