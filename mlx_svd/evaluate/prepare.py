"""A task's name, or a file of one's own -> a job."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.choice_job import Subject, answer_job, choice_job
from mlx_svd.evaluate.choice_task import ChoiceTask
from mlx_svd.evaluate.job import Job
from mlx_svd.evaluate.material import choice_material, file_material
from mlx_svd.evaluate.rows import answer_row, choice_row, read_jsonl
from mlx_svd.evaluate.settings import EvaluateSettings
from mlx_svd.evaluate.tasks import CHOICE_TASKS, check_name

_SUFFIXES = (".jsonl",)


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise MlxSvdError for a name that is neither a task nor a file, before anything is loaded,
    and for one that is given twice."""
    if not tasks:
        raise MlxSvdError("--tasks: names no task; give one or more, comma-separated")
    names = [_file_name(Path(task)) if _is_file(task) else task for task in tasks]
    for name, task in zip(names, tasks, strict=True):
        if not _is_file(task):
            check_name(task)
        if names.count(name) > 1:
            raise MlxSvdError(f"{task}: the task {name} is given twice; rename or leave out one")


def prepare(task: str, subject: Subject, settings: EvaluateSettings) -> Job:
    """The job of one task. Raises MlxSvdError naming task, file and line for bad rows."""
    if _is_file(task):
        return _own(Path(task), subject, settings)
    chosen = CHOICE_TASKS[task]
    return choice_job(chosen, choice_material(chosen, settings), subject, settings)


def _own(path: Path, subject: Subject, settings: EvaluateSettings) -> Job:
    """A task made of the user's rows: {question, choices, label} or {prompt, answer}."""
    name = _file_name(path)
    where, first = next(read_jsonl(path))
    if "choices" in first:
        # The question is the prompt, word by word: whoever wants "Question:" writes it there.
        task = ChoiceTask(name, prompt=lambda row: row.question)
        return choice_job(task, file_material(path, choice_row, settings), subject, settings)
    if "answer" in first:
        return answer_job(name, file_material(path, answer_row, settings), subject, settings)
    keys = json.dumps(sorted(first))
    raise MlxSvdError(
        f"{where} has the fields {keys}; give question, choices and label, or prompt and answer"
    )


def _is_file(task: str) -> bool:
    return Path(task).suffix in _SUFFIXES or "/" in task


def _file_name(path: Path) -> str:
    """Name of the task of a file; it becomes part of names of files."""
    if not path.is_file():
        raise MlxSvdError(f"{path}: no such file of rows")
    return re.sub(r"[^\w.-]", "_", path.stem)
