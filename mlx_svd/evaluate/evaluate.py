"""Evaluate a model on tasks: rows -> batches -> records on disk -> scores with intervals."""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from mlx_svd import __version__
from mlx_svd.checkpoint.loader import load, load_tokenizer
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.jobs.base import Base, find_base, holds_results
from mlx_svd.evaluate.jobs.choice_job import Subject
from mlx_svd.evaluate.jobs.job import Job, Record
from mlx_svd.evaluate.likelihood.encode import context_length
from mlx_svd.evaluate.likelihood.forward import written_out
from mlx_svd.evaluate.likelihood.scorer import Scorer
from mlx_svd.evaluate.prepare import (
    Bench,
    base_tasks,
    check_tasks,
    expanded,
    read_rows,
)
from mlx_svd.evaluate.processes import Processes
from mlx_svd.evaluate.results.document import (
    Scored,
    earlier_results,
    results_of,
    with_earlier_tasks,
    write_results,
)
from mlx_svd.evaluate.results.folder import check_folder, own_folder
from mlx_svd.evaluate.results.model_digest import model_digest
from mlx_svd.evaluate.results.sample_file import SampleFile
from mlx_svd.evaluate.results.table import write_tables
from mlx_svd.evaluate.settings import EvaluateSettings
from mlx_svd.evaluate.tasks import composite, kl
from mlx_svd.source.resolve import CHECKPOINT_PATTERNS, resolve_model
from mlx_svd.source.source import read_config

Advance = Callable[[str, int, int], None]


def evaluate(
    model: str,
    tasks: Sequence[str],
    output: Path,
    settings: EvaluateSettings | None = None,
    *,
    revision: str | None = None,
    advance: Advance = lambda task, done, total: None,
) -> dict[str, Any]:
    """Score ``tasks`` (names, or files of rows) on ``model``; returns what results.json holds.

    Writes into ``output`` samples_TASK.jsonl as items are done, then results.json, results.md and
    results.csv. A run that was killed goes on after its last complete batch; files that were begun
    under other conditions are refused, and a folder with records of another model or dtype, or in
    which another run writes. All rows are read before a model is loaded, and all tasks are prepared
    before the first is scored. ``advance`` is told how many items of a task are done. Processes of
    mlx.launch share the work; the first one writes. Raises MlxSvdError for bad input.
    """
    settings = settings or EvaluateSettings()
    check_tasks(tasks)
    began, processes = time.time(), Processes()
    folder = resolve_model(model, revision, CHECKPOINT_PATTERNS)
    digest = _digest(folder.path, processes)
    _check_kl(tasks, settings, processes)
    rows = [read_rows(name, settings) for name in expanded(tasks)]
    with ExitStack() as held:
        processes.from_first(lambda: held.enter_context(own_folder(output)))
        processes.from_first(lambda: _check_folder(output, digest, settings.dtype))
        run_base = partial(evaluate, advance=advance)
        base = find_base(settings, base_tasks(tasks), output, run_base, processes)
        bench = _bench(folder.path, settings, base, processes)
        # All before the first is scored, so that what does not fit is said at once.
        jobs = [prepare(bench) for prepare in rows]
        scored = []
        for job in jobs:
            start = time.perf_counter()
            conditions = _conditions(job, digest, settings, base.digest if base else None)
            records, new = _records(job, output, processes, conditions, advance)
            seconds = time.perf_counter() - start
            scored.append(Scored(job, job.summarize(records), seconds, new))
        if composite.NAME in tasks:
            scored.append(_composite(scored))
        results_now = results_of(
            scored,
            model=folder.name,
            digest=digest,
            settings=settings,
            max_length=bench.subject.max_length,
            began=began,
            processes=processes.size,
        )
        results = processes.from_first(lambda: with_earlier_tasks(output, results_now))
        if processes.first:
            write_results(output, results)
            write_tables(output, results)
    return results


def _check_folder(output: Path, digest: str, dtype: str | None) -> None:
    check_folder(output, digest, dtype)
    earlier_results(output, digest, dtype)


def _check_kl(tasks: Sequence[str], settings: EvaluateSettings, processes: Processes) -> None:
    base = settings.base
    if kl.NAME in tasks and (not base or processes.from_first(lambda: holds_results(Path(base)))):
        given = f" in place of the results in {base}" if base else ""
        raise MlxSvdError(
            f"kl: compares with another model's predictions; give --base MODEL{given}"
        )


def _bench(
    folder: Path, settings: EvaluateSettings, base: Base | None, processes: Processes
) -> Bench:
    """Load the model; the base model is loaded when a task calls for it."""
    bench = Bench(_subject(folder, settings), settings, base)
    if base and base.model:
        base_folder = resolve_model(base.model, None, CHECKPOINT_PATTERNS).path
        base.digest = _digest(base_folder, processes)
        bench.base_model = kl.BaseModel(
            lambda: load_tokenizer(base_folder, read_config(base_folder)),
            lambda: _subject(base_folder, settings),
        )
    return bench


def _digest(folder: Path, processes: Processes) -> str:
    return processes.from_first(lambda: model_digest(folder))


def _composite(scored: list[Scored]) -> Scored:
    """The composite of what has been scored, which has no records of its own."""
    jobs = {done.job.task: done.job for done in scored}
    score = composite.composite({done.job.task: done.scores for done in scored})
    parts = [jobs[task] for task, _, _ in composite.PARTS]
    digest = hashlib.sha256("".join(job.digest for job in parts).encode()).hexdigest()
    job = Job(
        composite.NAME, 1.0, 0, [i for job in parts for i in job.ids], [],
        sum(job.total for job in parts), digest, "its parts", [], lambda number: [],
        lambda records: {}, {},
    )  # fmt: skip
    return Scored(job, {composite.NAME: score}, 0.0, 0)


def _subject(folder: Path, settings: EvaluateSettings) -> Subject:
    model, tokenizer = load(folder, dtype=settings.dtype)
    length = context_length(read_config(folder), tokenizer)
    if settings.max_length is not None:
        if settings.max_length > length:
            raise MlxSvdError(
                f"--max-length {settings.max_length}: the model has a context of {length} tokens"
            )
        length = settings.max_length
    return Subject(Scorer(written_out(model)), tokenizer, length)


def _conditions(
    job: Job, digest: str, settings: EvaluateSettings, base_digest: str | None
) -> dict[str, Any]:
    """What the records of a task depend on. Where the base model is stored is not part of it."""
    return {
        "task": job.task,
        "model": digest,
        "data": job.digest,
        "mlx_svd": __version__,
        **settings.conditions(),
        "base": base_digest,
        **job.config,
    }


def _records(
    job: Job,
    output: Path,
    processes: Processes,
    conditions: dict[str, Any],
    advance: Advance,
) -> tuple[list[Record], int]:
    """All records of a job in the order of its documents, from disk where they are already, and how
    many were not."""
    files: list[SampleFile] = []

    def begin() -> list[int]:
        files.append(SampleFile(output, job, conditions))
        return sorted(files[0].records)

    known = set(processes.from_first(begin))
    left = [
        number
        for number, batch in enumerate(job.batches)
        if not known.issuperset(job.doc_ids[i] for i in batch)
    ]
    new_items = 0
    advance(job.task, len(known), len(job.ids))
    for number, records in processes.run(left, job.run):
        new = [
            {"doc_id": job.doc_ids[i], "id": job.ids[i], "task": job.task, **record}
            for i, record in zip(job.batches[number], records, strict=True)
            if job.doc_ids[i] not in known
        ]
        processes.from_first(partial(_add, files, new))
        new_items += len(new)
        advance(job.task, len(known) + new_items, len(job.ids))
    return processes.from_first(lambda: files[0].finish()), new_items


def _add(files: list[SampleFile], records: list[Record]) -> None:
    files[0].add(records)
