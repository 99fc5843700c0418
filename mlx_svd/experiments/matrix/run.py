"""Run an experiment: the runs that are missing, in one process or several, then the statistics."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from mlx_svd.checkpoint.disk import disk_errors, replace_file
from mlx_svd.conditions import conditions, peak_memory
from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.matrix.config import Experiment
from mlx_svd.experiments.matrix.jobs import Job, Status, make_jobs, record_of, status
from mlx_svd.experiments.matrix.kinds import make_kind
from mlx_svd.experiments.matrix.kinds.base import Kind
from mlx_svd.experiments.matrix.places import Places
from mlx_svd.experiments.matrix.record import to_json
from mlx_svd.experiments.matrix.summary import summarize

# What says how many threads a BLAS may use; read when a process starts.
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
Advance = Callable[[str, int, int], None]


def experiment_status(
    experiment: Experiment, output: Path, places: Places, seeds: int | None = None
) -> Status:
    """Which runs there are, which are done, and what the rest will cost; nothing is run."""
    kind = make_kind(experiment, places)
    chosen = _seeds(experiment, seeds)
    return status(experiment, make_jobs(experiment, kind, places, output, chosen))


def run_experiment(
    experiment: Experiment,
    output: Path,
    places: Places,
    *,
    seeds: int | None = None,
    workers: int = 1,
    advance: Advance = lambda label, done, total: None,
) -> dict[str, Any]:
    """Run what is missing and return the results, which results.json holds too.

    output: folder of the records and results; seeds: only so many of the file's; workers:
    processes, each with its own models and its share of the threads. ``advance`` is told each run
    as it is done, and how many are. A run that cannot be made (a budget out of reach, a training
    that diverges) has a ``reason`` in place of numbers; its record must be deleted to try again.
    Raises MlxSvdError for bad input.
    """
    if workers < 1:
        raise MlxSvdError(f"--workers {workers}: must be at least 1")
    chosen = _seeds(experiment, seeds)
    kind = make_kind(experiment, places)
    jobs = make_jobs(experiment, kind, places, output, chosen)
    missing = status(experiment, jobs).missing
    with disk_errors(output, "--output"):
        (output / "records").mkdir(parents=True, exist_ok=True)
        places.shared.mkdir(parents=True, exist_ok=True)
    done = len(jobs) - len(missing)
    for label in _run_all(experiment, kind, places, missing, workers):
        done += 1
        advance(label, done, len(jobs))
    records = [record for record in status(experiment, jobs).done if record is not None]
    results = summarize(replace(experiment, seeds=tuple(chosen)), records)
    results["limit"] = places.limit
    results["conditions_of_this_run"] = conditions()
    replace_file(output / "results.json", json.dumps(results, indent=2).encode())
    return results


def _seeds(experiment: Experiment, count: int | None) -> list[int]:
    if count is not None and count < 1:
        raise MlxSvdError(f"--seeds {count}: must be at least 1")
    return list(experiment.seeds[:count])


def _run_all(
    experiment: Experiment, kind: Kind, places: Places, jobs: Sequence[Job], workers: int
) -> Iterator[str]:
    """Labels of runs as they are done."""
    groups = _grouped(kind, jobs)
    if workers == 1 or len(groups) < 2:
        for job in (job for group in groups for job in group):
            run_job(kind, job)
            yield job.label
        return
    # Processes that are started anew: a forked one cannot use MLX's threads or device.
    with (
        _shared_threads(workers),
        ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent) as pool,
    ):
        running = {pool.submit(_run_in_child, experiment, places, g): g for g in groups}
        try:
            for future in as_completed(running):
                future.result()
                yield from (job.label for job in running[future])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _grouped(kind: Kind, jobs: Sequence[Job]) -> list[list[Job]]:
    """Runs that share what takes long to make, together; the largest groups first, so that no
    process is left alone with one at the end."""
    groups: dict[str | int, list[Job]] = {}
    for number, job in enumerate(jobs):
        group = kind.group(job.condition.settings, job.seed)
        groups.setdefault(number if group is None else group, []).append(job)
    return sorted(groups.values(), key=len, reverse=True)


@contextmanager
def _shared_threads(workers: int) -> Iterator[None]:
    """Processes that start within get their share of the cores, unless the user said otherwise."""
    share = str(max(1, (os.cpu_count() or 1) // workers))
    new = {name: share for name in _THREADS if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


def _end_with_parent() -> None:
    """A child whose parent was killed would wait for work for ever. What it was running is lost and
    made again: records appear when they are complete."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# Of a child process: models that are loaded serve all of its runs.
_kinds: dict[tuple, Kind] = {}


def _run_in_child(experiment: Experiment, places: Places, jobs: Sequence[Job]) -> None:
    key = (experiment.name, places)
    if key not in _kinds:
        _kinds[key] = make_kind(experiment, places)
    for job in jobs:
        run_job(_kinds[key], job)


def run_job(kind: Kind, job: Job) -> None:
    """Run and write the record, which appears when it is complete."""
    began, cpu = time.perf_counter(), time.process_time()
    try:
        measured = to_json(kind.run(job.condition.settings, job.seed or 0))
    except MlxSvdError as error:
        measured = {"reason": str(error)}
    record = record_of(job, measured) | {
        "seconds": round(time.perf_counter() - began, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "peak_memory": peak_memory(),
        "conditions": conditions(),
    }
    replace_file(job.file, json.dumps(record).encode())
