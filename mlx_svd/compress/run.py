"""The main job: a model in, a checkpoint for mlx-lm out."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_svd import __version__
from mlx_svd.calibrate.scorers import SCORERS
from mlx_svd.calibrate.statistics import Calibration
from mlx_svd.checkpoint.writer import CheckpointWriter
from mlx_svd.compress.files import checkpoint_files
from mlx_svd.compress.modules import ModuleRunner
from mlx_svd.errors import MlxSvdError
from mlx_svd.parallel import default_workers, ordered_map
from mlx_svd.plan.plan import Plan, Unit
from mlx_svd.source.source import Source


def compress(
    source: Source,
    plan: Plan,
    mlx_path: Path,
    command: str = "",
    advance: Callable[[Unit], None] = lambda unit: None,
    workers: int | None = None,
    calibration: Calibration | None = None,
) -> Path:
    """Write the checkpoint that ``plan`` describes into the new folder ``mlx_path``.

    Holds at most ``workers`` modules in memory. A run that was killed is continued by the same
    call, and the files are bit-identical to those of one run. ``advance`` is told every unit
    that is done, also those that an earlier run did. Returns mlx_path. Raises MlxSvdError for
    damaged source tensors, an existing folder, a full disk, and a calibration
    that is not the one the plan was made with.
    """
    check_calibration(source, plan, calibration)
    writer = CheckpointWriter(
        mlx_path, [(u.path, u.tensors) for u in plan.units], _run_digest(source, plan)
    )
    # Freed tensors go back at once: one module in memory, not a cache of them.
    cache_limit = mx.set_cache_limit(0)
    try:
        for unit in plan.units:
            if unit.path in writer.done:
                advance(unit)
        runner = ModuleRunner(source, plan, calibration)
        units = [u for u in plan.units if u.path not in writer.done]
        jobs = runner.read(source.stream(), units)
        for job, matrices in ordered_map(runner.decompose, jobs, workers or default_workers()):
            stored = runner.store(job, matrices)
            writer.write(job.unit.path, stored.tensors, stored.records)
            advance(job.unit)
            del job, matrices, stored
        records = {path: r for unit in plan.units for path, r in writer.done[unit.path].items()}
        writer.finish(checkpoint_files(source, plan, records, command))
    finally:
        writer.close()
        mx.set_cache_limit(cache_limit)
    return mlx_path


def check_calibration(source: Source, plan: Plan, calibration: Calibration | None) -> None:
    """Raise MlxSvdError unless ``calibration`` is the one that the plan rests on."""
    made_with = plan.calibration and plan.calibration["digest"]
    given = calibration and calibration.info.digest
    if not given and SCORERS[plan.scorer] and not made_with:
        raise MlxSvdError(
            f"--scorer {plan.scorer}: needs a calibration; make one with mlx-svd calibrate, and "
            "the plan with it"
        )
    if made_with and not given:
        raise MlxSvdError(
            "the plan rests on a calibration; give it with --calibration, made from "
            f"{plan.calibration['origin']}"
        )
    if given and given != made_with:
        raise MlxSvdError(
            f"{calibration.folder}: is not the calibration that the plan was made with; give that "
            "one, or make a new plan"
        )
    if calibration is not None:
        calibration.check(source, SCORERS[plan.scorer])


def _run_digest(source: Source, plan: Plan) -> str:
    """Identifies plan, source files and program; a run is resumed only with the same of all."""
    files = sorted({header.file for header in source.headers.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([__version__, plan.digest, stats]).encode()).hexdigest()
