"""The runs of an experiment: which there are, which are done, what the rest will cost."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_svd import __version__
from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.matrix.config import Condition, Experiment
from mlx_svd.experiments.matrix.kinds.base import Kind
from mlx_svd.experiments.matrix.places import Places
from mlx_svd.experiments.methods import slug


@dataclass(frozen=True)
class Job:
    """One condition with one seed (None: nothing is random, one run says all). key: digest of all
    that the result depends on; file: of its record."""

    condition: Condition
    seed: int | None
    key: str
    file: Path

    @property
    def label(self) -> str:
        """For progress."""
        return self.condition.name + ("" if self.seed is None else f", seed {self.seed}")


@dataclass(frozen=True)
class Status:
    """done: records that are there, in the order of the jobs, None where a run is missing;
    seconds: estimated for the missing ones in one process, None if nothing tells; guessed: how
    many of these rest on the file's own guess and on no finished record."""

    jobs: tuple[Job, ...]
    done: tuple[dict[str, Any] | None, ...]
    seconds: float | None
    guessed: int

    @property
    def missing(self) -> list[Job]:
        """Runs that are left."""
        return [job for job, record in zip(self.jobs, self.done, strict=True) if record is None]


def make_jobs(
    experiment: Experiment, kind: Kind, places: Places, folder: Path, seeds: Sequence[int]
) -> list[Job]:
    """All runs. Raises MlxSvdError that names a condition whose settings make no sense."""
    jobs = []
    for condition in experiment.conditions:
        try:
            kind.check(condition.settings)
            chosen = seeds if kind.seeded(condition.settings) else [None]
            inputs = kind.inputs(condition.settings)
        except MlxSvdError as error:
            raise MlxSvdError(f"condition {condition.name!r}: {error}") from error
        for seed in chosen:
            content = [
                __version__, experiment.kind, experiment.settings, condition.settings, seed,
                places.limit, inputs,
            ]  # fmt: skip
            text = json.dumps(content, sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()
            ending = "" if seed is None else f".seed-{seed}"
            file = folder / "records" / f"{slug(condition.name)}{ending}.json"
            jobs.append(Job(condition, seed, key, file))
    return jobs


def status(experiment: Experiment, jobs: Sequence[Job]) -> Status:
    """Read the records that are there, and estimate the rest from them."""
    done = tuple(map(finished, jobs))
    known: dict[str, list[float]] = {}
    for job, record in zip(jobs, done, strict=True):
        if record is not None:
            known.setdefault(job.condition.name, []).append(record["seconds"])
    every = [s for seconds in known.values() for s in seconds]
    total, guessed = 0.0, 0
    for job, record in zip(jobs, done, strict=True):
        if record is not None:
            continue
        # Other seeds of the condition, else other conditions, else what the file says.
        seconds = known.get(job.condition.name) or every
        if seconds:
            total += sum(seconds) / len(seconds)
        elif experiment.seconds_per_run is None:
            return Status(tuple(jobs), done, None, 0)
        else:
            total += experiment.seconds_per_run
            guessed += 1
    return Status(tuple(jobs), done, total, guessed)


def finished(job: Job) -> dict[str, Any] | None:
    """The record of a run, None if there is none of these very settings."""
    if not job.file.is_file():
        return None
    try:
        record = json.loads(job.file.read_bytes())
    except ValueError as error:
        raise MlxSvdError(f"{job.file}: is damaged; delete it") from error
    return record if record.get("key") == job.key else None


def record_of(job: Job, measured: dict[str, Any]) -> dict[str, Any]:
    """A record: what was run, then what it gave."""
    return {
        "key": job.key,
        "condition": job.condition.name,
        "settings": asdict(job.condition)["settings"],
        "seed": job.seed,
        "version": __version__,
        **measured,
    }
