"""A task's name, or a file of one's own -> its rows -> a job."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.facts import Fact
from mlx_svd.evaluate.generation.prompts import read_prompts
from mlx_svd.evaluate.jobs.base import Base
from mlx_svd.evaluate.jobs.choice_job import Subject, answer_job, choice_job
from mlx_svd.evaluate.jobs.job import Job
from mlx_svd.evaluate.rows.choice_task import ChoiceTask
from mlx_svd.evaluate.rows.fact_rows import HUB as FACTS_HUB
from mlx_svd.evaluate.rows.fact_rows import facts_file, hub_facts
from mlx_svd.evaluate.rows.material import Material, choice_material, file_material, find_file
from mlx_svd.evaluate.rows.read import answer_row, choice_row, read_jsonl
from mlx_svd.evaluate.settings import EvaluateSettings
from mlx_svd.evaluate.tasks import (
    CHOICE_TASKS,
    check_name,
    composite,
    conversation,
    facts,
    generation,
    kl,
    perplexity,
    reasoning,
)

_SUFFIXES = (".jsonl", ".json", ".txt")


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise MlxSvdError for a name that is neither a task nor a file, before anything is loaded,
    and for one that is given twice."""
    if not tasks:
        raise MlxSvdError("--tasks: names no task; give one or more, comma-separated")
    for task in tasks:
        if not _is_file(task):
            check_name(task)
    # Also with the parts of the composite: a file may have the name of one.
    for given in (tasks, expanded(tasks)):
        names = [task_name(task) for task in given]
        for name, task in reversed(list(zip(names, given, strict=True))):
            if names.count(name) > 1:
                raise MlxSvdError(
                    f"{task}: the task {name} is given twice; rename or leave out one"
                )


@dataclass
class Bench:
    """What jobs are made for: the model under test, and what it is compared with.

    base: results of the base model, None without; base_model: the model itself, which the task kl
    needs; None if only its results are there.
    """

    subject: Subject
    settings: EvaluateSettings
    base: Base | None = None
    base_model: kl.BaseModel | None = None


Prepare = Callable[[Bench], Job]


def base_tasks(tasks: Sequence[str]) -> list[str]:
    """Those of the tasks that a base model is evaluated on too, for ``compare``: all but kl, which
    runs the base model itself."""
    return [task for task in tasks if task != kl.NAME]


def expanded(tasks: Sequence[str]) -> list[str]:
    """With the parts of the composite, each once, in the order in which they are first named."""
    names: dict[str, None] = {}
    for task in tasks:
        parts = [part for part, _, _ in composite.PARTS] if task == composite.NAME else [task]
        names |= dict.fromkeys(parts)
    return list(names)


def read_rows(task: str, settings: EvaluateSettings) -> Prepare:
    """Read and check the rows of a task, before any model is loaded; they become a job when what is
    returned is called. Raises MlxSvdError naming task, file and line for bad rows."""
    if _is_file(task):
        return _own(Path(task), settings)
    if task in CHOICE_TASKS:
        return _choices(CHOICE_TASKS[task], choice_material(CHOICE_TASKS[task], settings))
    if task == facts.NAME:
        return _facts(*_known_facts(settings))
    if task == reasoning.NAME:
        return lambda bench: reasoning.job(bench.subject, bench.settings)
    if task == generation.NAME:
        prompts = read_prompts(settings.prompts)
        return lambda bench: generation.job(prompts, bench.subject, bench.settings)
    if task == conversation.NAME:
        rows = conversation.read(settings)
        return lambda bench: conversation.job(*rows, bench.subject, bench.settings)
    text, origin = perplexity.read_text(settings)
    if task == perplexity.NAME:
        return _text(text, origin)
    return lambda bench: kl.job(text, origin, bench.subject, bench.base_model, bench.settings)


def _choices(task: ChoiceTask, material: Material) -> Prepare:
    return lambda bench: choice_job(task, material, bench.subject, bench.settings, bench.base)


def _facts(found: list[Fact], origin: str, name: str = facts.NAME) -> Prepare:
    return lambda bench: facts.job(found, origin, bench.subject, bench.settings, bench.base, name)


def _text(text: str, origin: str, name: str = perplexity.NAME) -> Prepare:
    return lambda bench: perplexity.job(text, origin, bench.subject, bench.settings, name)


def _known_facts(settings: EvaluateSettings) -> tuple[list[Fact], str]:
    if settings.data_dir is None:
        return hub_facts(), FACTS_HUB.repo
    path = find_file(settings.data_dir, "facts.json")
    return facts_file(path, settings.seed), path.name


def _own(path: Path, settings: EvaluateSettings) -> Prepare:
    """A task made of the user's rows: {question, choices, label} or {prompt, answer} in JSON lines,
    a JSON list of facts, or a text."""
    name = _file_name(path)
    if path.suffix == ".txt":
        return _text(perplexity.plain_text(path), path.name, name)
    if path.suffix == ".json":
        return _facts(facts_file(path, settings.seed), path.name, name)
    where, first = next(read_jsonl(path))
    if "choices" in first:
        # The question is the prompt, word by word: whoever wants "Question:" writes it there.
        task = ChoiceTask(name, prompt=lambda row: row.question)
        return _choices(task, file_material(path, choice_row, settings))
    if "answer" in first:
        rows = file_material(path, answer_row, settings)
        return lambda bench: answer_job(name, rows, bench.subject, bench.settings)
    keys = json.dumps(sorted(first))
    raise MlxSvdError(
        f"{where} has the fields {keys}; give question, choices and label, or prompt and answer"
    )


def _is_file(task: str) -> bool:
    return Path(task).suffix in _SUFFIXES or "/" in task


def task_name(task: str) -> str:
    """Under which a task or a file appears in results. Raises MlxSvdError for a missing file."""
    return _file_name(Path(task)) if _is_file(task) else task


def _file_name(path: Path) -> str:
    """Name of the task of a file; it becomes part of names of files."""
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "no such file of rows"
        raise MlxSvdError(f"{path}: {kind}; give a .jsonl, .json or .txt file, or a task's name")
    return re.sub(r"[^\w.-]", "_", path.stem)
