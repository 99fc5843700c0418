"""Scores of all tasks in the schema of lm-eval's results JSON, with their conditions."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_svd import conditions
from mlx_svd.checkpoint.disk import replace_file
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.jobs.base import RESULTS_FILE
from mlx_svd.evaluate.jobs.job import Job, Score, metric_key
from mlx_svd.evaluate.results.folder import REMEDY
from mlx_svd.evaluate.settings import EvaluateSettings
from mlx_svd.evaluate.statistics.power import limit_note
from mlx_svd.strict_json import finite

_WORK = ("task_seconds", "items_scored")
_BY_TASK = (
    "results",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
    "intervals",
    "task_settings",
    "data_hashes",
    "task_hashes",
    *_WORK,
)
# Difference of two models, as a share, that a limit should let a paired comparison find.
_MARGIN = 0.01


@dataclass(frozen=True)
class Scored:
    """A task that is done: its scores, and what this run did for them: seconds, and items that it
    scored; an earlier one may have left it some, or all."""

    job: Job
    scores: dict[str, Score]
    seconds: float
    items: int


def results_of(
    scored: Sequence[Scored],
    *,
    model: str,
    digest: str,
    settings: EvaluateSettings,
    max_length: int,
    began: float,
    processes: int,
) -> dict[str, Any]:
    """The whole document.

    Beside lm-eval's keys stand ``intervals`` (95 %, None for an infinite end; chance level and
    whether it is inside), ``task_settings`` (of the run that each task is from),
    ``data_hashes``, ``items_scored`` (in ``task_seconds``), ``versions_of_packages``, ``command``,
    ``peak_memory`` and ``notes``.
    """
    jobs = [done.job for done in scored]
    return {
        "results": {done.job.task: _metrics(done) for done in scored},
        "group_subtasks": {job.task: [] for job in jobs},
        "configs": {job.task: _config(job) for job in jobs},
        "versions": {job.task: job.version for job in jobs},
        "n-shot": {job.task: job.shots for job in jobs},
        "higher_is_better": {
            done.job.task: {name: score.higher_is_better for name, score in done.scores.items()}
            for done in scored
        },
        "n-samples": {job.task: {"original": job.total, "effective": len(job.ids)} for job in jobs},
        "config": {
            "model": "mlx-svd",
            "model_args": {"path": model, "dtype": settings.dtype},
            "model_dtype": settings.dtype,
            "model_sha": digest,
            "batch_size": None,
            "device": str(mx.default_device()),
            "limit": settings.limit,
            "random_seed": settings.seed,
            "fewshot_seed": settings.seed,
            "settings": settings.conditions(),
        },
        "intervals": {done.job.task: _intervals(done.scores) for done in scored},
        "task_settings": {job.task: _settings(job, settings, max_length) for job in jobs},
        "data_hashes": {job.task: job.digest for job in jobs},
        "task_hashes": {job.task: job.digest for job in jobs},
        "notes": [note for done in scored for note in _notes(done.job, done.scores)],
        "model_source": "mlx-svd",
        "model_name": model,
        "model_name_sanitized": model.replace("/", "__"),
        "max_length": max_length,
        "chat_template": None,
        "date": began,
        "total_evaluation_time_seconds": str(time.time() - began),
        "task_seconds": {done.job.task: done.seconds for done in scored},
        "items_scored": {done.job.task: done.items for done in scored},
        "peak_memory": peak_memory(),
        "processes": processes,
    } | conditions.conditions()


def peak_memory() -> dict[str, int]:
    """Bytes: of this process as the system counts them, and of MLX's arrays."""
    return {"process": conditions.peak_memory(), "mlx": mx.get_peak_memory()}


def earlier_results(folder: Path, model: str, dtype: str | None) -> dict[str, Any] | None:
    """results.json of a folder, None without. Raises MlxSvdError if it cannot take another task's
    results: of another model (its digest) or dtype, or not by this version of ``evaluate``."""
    path = folder / RESULTS_FILE
    if not path.is_file():
        return None
    try:
        earlier = json.loads(path.read_bytes())
        missing = [key for key in _BY_TASK if not isinstance(earlier[key], dict)]
        same = (earlier["config"]["model_sha"], earlier["config"]["model_dtype"]) == (model, dtype)
        if missing or not isinstance(earlier["notes"], list):
            raise ValueError("keys of another type")
    except (ValueError, KeyError, TypeError) as error:
        raise MlxSvdError(
            f"{path}: is no result of this version of mlx-svd evaluate; {REMEDY}"
        ) from error
    if not same:
        raise MlxSvdError(f"{path}: is of another model or dtype; {REMEDY}")
    return earlier


def with_earlier_tasks(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """The results, and those of other tasks that this folder holds. Raises MlxSvdError as
    ``earlier_results``."""
    config = results["config"]
    earlier = earlier_results(folder, config["model_sha"], config["model_dtype"])
    if earlier is None:
        return results
    kept = {key: {**earlier[key], **results[key]} for key in _BY_TASK}
    for task, items in results["items_scored"].items():
        if not items and task in earlier["results"]:
            # Nothing was left to do, so what it took is what it took then.
            kept |= {key: {**kept[key], task: earlier[key][task]} for key in _WORK}
    notes = [n for n in earlier["notes"] if n.partition(":")[0] not in results["results"]]
    return {**results, **kept, "notes": [*notes, *results["notes"]]}


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json; it appears when it is complete."""
    text = json.dumps(results, indent=2, allow_nan=False)
    replace_file(folder / RESULTS_FILE, text.encode())


def _metrics(done: Scored) -> dict[str, Any]:
    task = done.job.task
    found: dict[str, Any] = {"alias": task, "name": task, "sample_len": len(done.job.ids)}
    for name, score in done.scores.items():
        found[metric_key(name)] = finite(score.value)
        # lm-eval writes "N/A" where there is no standard error.
        found[metric_key(name, "_stderr")] = "N/A" if score.stderr is None else score.stderr
    return found


def _intervals(scores: dict[str, Score]) -> dict[str, Any]:
    return {
        name: {
            "low": finite(score.low),
            "high": finite(score.high),
            "n": score.n,
            "chance": score.chance,
            "at_chance": score.at_chance,
        }
        for name, score in scores.items()
    }


def _settings(job: Job, settings: EvaluateSettings, max_length: int) -> dict[str, Any]:
    """As they were for this task; context: tokens, with or without --max-length."""
    return settings.conditions() | {"num_fewshot": job.shots, "context": max_length}


def _notes(job: Job, scores: dict[str, Score]) -> list[str]:
    """Those of the job, and what its limit implies for a score that is a share."""
    limited = len(job.ids) < job.total and any(s.chance is not None for s in scores.values())
    few = limit_note(len(job.ids), _MARGIN) if limited else ""
    return [*job.notes, *([f"{job.task}: {few}"] if few else [])]


def _config(job: Job) -> dict[str, Any]:
    return {
        "task": job.task,
        "dataset_path": job.origin,
        "num_fewshot": job.shots,
        "metadata": {"version": job.version},
        **job.config,
    }
