"""The main job: a model in, a checkpoint for mlx-lm out."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_svd import __version__
from mlx_svd.calibrate.fit import LowRank
from mlx_svd.calibrate.scorers import SCORERS, Scoring
from mlx_svd.calibrate.sliced import Affine
from mlx_svd.calibrate.statistics import Calibration
from mlx_svd.checkpoint.writer import CheckpointWriter
from mlx_svd.compress.decompose import decompose_projection
from mlx_svd.compress.files import checkpoint_files
from mlx_svd.compress.slicing import PartnerReader, SlicedMatrix, slice_matrix, store_sliced
from mlx_svd.compress.store import (
    check_range,
    squared_error,
    squared_norm,
    store_low_rank,
    store_part,
    store_weight,
    to_numpy,
)
from mlx_svd.errors import MlxSvdError
from mlx_svd.parallel import default_workers, ordered_map
from mlx_svd.plan.plan import Plan, ProjectionPlan, Unit, target_dtype
from mlx_svd.plan.units import stays_fused
from mlx_svd.source.source import Source, TensorStream


@dataclass(frozen=True)
class _Job:
    """One unit with its tensors in memory: weights of the projections to decompose as numpy;
    partners: projection name -> itself and those it is sliced with."""

    unit: Unit
    tensors: dict[str, mx.array]
    weights: dict[str, mx.array]
    low_rank: dict[str, np.ndarray]
    partners: dict[str, dict[str, Affine]]


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
        runner = _Runner(source, plan, calibration)
        units = [u for u in plan.units if u.path not in writer.done]
        jobs = runner.read(source.stream(), units)
        for job, matrices in ordered_map(runner.decompose, jobs, workers or default_workers()):
            tensors, record = runner.store(job, matrices)
            writer.write(job.unit.path, tensors, record)
            advance(job.unit)
            del job, matrices, tensors
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


class _Runner:
    def __init__(self, source: Source, plan: Plan, calibration: Calibration | None):
        self.source, self.plan = source, plan
        self.scoring = Scoring(plan.scorer, plan.importance_window, calibration)
        self.partners = PartnerReader(source, plan)

    def _linear(self, unit: Unit):
        return None if unit.linear_index is None else self.source.linears[unit.linear_index]

    def read(self, stream: TensorStream, units: list[Unit]) -> Iterator[_Job]:
        """Main thread: take each unit's tensors from the files."""
        for unit in units:
            tensors = {n.rpartition(".")[2]: stream.take(n) for n in unit.sources}
            linear = self._linear(unit)
            weights, low_rank, partners = {}, {}, {}
            if linear is not None:
                weights = linear.split(tensors["weight"])
                biases = linear.split(tensors["bias"]) if "bias" in tensors else {}
                for p in linear.projections:
                    if self._is_fitted(self.plan.by_path[p.path]):
                        low_rank[p.name] = to_numpy(weights[p.name])
                    if self.plan.by_path[p.path].form == "sliced":
                        partners[p.name] = self.partners.matrices(
                            p, low_rank[p.name], biases.get(p.name)
                        )
            yield _Job(unit, tensors, weights, low_rank, partners)

    def decompose(self, job: _Job) -> tuple[_Job, dict[str, list[LowRank] | SlicedMatrix]]:
        """Worker thread: LAPACK only."""
        linear = self._linear(job.unit)
        matrices = {}
        for p in linear.projections if linear else ():
            if p.name in job.low_rank:
                weight = job.low_rank[p.name]
                dtype = target_dtype(job.tensors["weight"].dtype, self.plan.dtype)
                plan, score = self.plan.by_path[p.path], self.scoring(p, weight)
                if plan.form == "sliced":
                    matrices[p.name] = slice_matrix(
                        self.partners.groups[p.path],
                        plan,
                        job.partners[p.name],
                        self.scoring.calibration.statistics,
                        score,
                        dtype,
                    )
                else:
                    matrices[p.name] = decompose_projection(weight, plan, score, dtype)
        return job, matrices

    def _is_fitted(self, plan: ProjectionPlan) -> bool:
        """Truncated, or quantized with statistics to round by."""
        quantized = plan.quantization is not None and plan.quantization.mode == "affine"
        return plan.changed or (quantized and self.scoring.calibrated(plan.projection))

    def store(
        self, job: _Job, matrices: dict[str, list[LowRank] | SlicedMatrix]
    ) -> tuple[list[mx.array], dict[str, dict]]:
        """Main thread: cast, quantize, measure. Returns the unit's tensors and, for each of its
        projections, {energy, relative_error}."""
        linear = self._linear(job.unit)
        if linear is None:
            return self._store_module(job), {}
        dtype = target_dtype(job.tensors["weight"].dtype, self.plan.dtype)
        biases = linear.split(job.tensors["bias"]) if "bias" in job.tensors else {}
        stored, record = {}, {}
        for p in linear.projections:
            plan, weight = self.plan.by_path[p.path], job.weights[p.name]
            matrix, noted = matrices.get(p.name), {}
            if isinstance(matrix, SlicedMatrix):
                tensors, read, noted = store_sliced(matrix, dtype, plan.quantization)
            else:
                tensors, read = self._store_projection(
                    plan, weight, matrix, biases.get(p.name), dtype
                )
            stored[p.name] = tensors
            if _stored_as_it_is(plan, job, dtype):
                record[p.path] = {"energy": 1.0, "relative_error": 0.0}
                continue
            check_range(p.path, tensors, dtype)
            norm = squared_norm(weight)
            error = (squared_error(weight, read) / norm) ** 0.5 if norm else 0.0
            noted = noted or {"energy": _energy(matrix)}
            record[p.path] = {**noted, "relative_error": error}
        if linear.fused and stays_fused(linear, self.plan.by_path):
            columns = zip(*stored.values(), strict=True)
            names = list(stored)
            joined = [linear.join(dict(zip(names, c, strict=True))) for c in columns]
            return joined, record
        return [tensor for tensors in stored.values() for tensor in tensors], record

    def _store_module(self, job: _Job) -> list[mx.array]:
        """A module without projections: cast, quantized if the plan says so."""
        stored = []
        for name in job.unit.sources:
            kind = name.rpartition(".")[2]
            tensor = job.tensors[kind]
            dtype = target_dtype(tensor.dtype, self.plan.dtype)
            quantized = job.unit.quantization if kind == "weight" else None
            tensors = (
                store_weight(tensor, dtype, quantized)[0] if quantized else [tensor.astype(dtype)]
            )
            if quantized or dtype != tensor.dtype:
                check_range(name, tensors, dtype)
            stored += tensors
        return stored

    @staticmethod
    def _store_projection(
        plan: ProjectionPlan,
        weight: mx.array,
        matrices: list[LowRank] | None,
        bias: mx.array | None,
        dtype: mx.Dtype,
    ) -> tuple[list[mx.array], mx.array]:
        q = plan.quantization
        if matrices is None or plan.form == "dense":
            if matrices is not None and len(matrices) == 1:
                tensors, read = store_part(matrices[0].parts["weight"], dtype, q)
            else:
                if matrices is not None:
                    weight = mx.concatenate([mx.array(m.parts["weight"]) for m in matrices])
                tensors, read = store_weight(weight, dtype, q)
            return tensors + ([] if bias is None else [bias.astype(dtype)]), read
        biases = [None] * len(matrices) if bias is None else mx.split(bias, len(matrices))
        stored, reads = [], []
        for matrix, part in zip(matrices, biases, strict=True):
            tensors, read = store_low_rank(matrix, part, dtype, q, plan.factors)
            stored += tensors
            reads.append(read)
        return stored, mx.concatenate(reads)


def _stored_as_it_is(plan: ProjectionPlan, job: _Job, dtype: mx.Dtype) -> bool:
    """Nothing is truncated, quantized or cast, so there is no error to measure."""
    if plan.changed or plan.quantization is not None:
        return False
    return all(tensor.dtype == dtype for tensor in job.tensors.values())


def _energy(matrices: list[LowRank] | None) -> float:
    """Share of the energy that the ranks keep, over all heads; 1 if nothing was truncated."""
    total = sum(m.energy for m in matrices) if matrices else 0.0
    return sum(m.kept for m in matrices) / total if total else 1.0
