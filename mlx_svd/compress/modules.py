"""Modules of a plan: read, decomposed in worker threads, stored as tensors."""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_svd.calibrate.fit import LowRank
from mlx_svd.calibrate.scorers import Scoring
from mlx_svd.calibrate.sliced import Affine
from mlx_svd.calibrate.statistics import Calibration
from mlx_svd.compress.decompose import decompose_projection
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
from mlx_svd.plan.plan import Plan, ProjectionPlan, Unit, target_dtype
from mlx_svd.plan.units import stays_fused
from mlx_svd.source.source import Source, TensorStream


@dataclass(frozen=True)
class Job:
    """One unit with its tensors in memory: weights of the projections to decompose as numpy;
    partners: projection name -> itself and those it is sliced with."""

    unit: Unit
    tensors: dict[str, mx.array]
    weights: dict[str, mx.array]
    low_rank: dict[str, np.ndarray]
    partners: dict[str, dict[str, Affine]]


@dataclass(frozen=True)
class Stored:
    """One unit as a checkpoint keeps it. tensors: in the order of the unit's; records: projection
    path -> {energy, relative_error}; weights: projection name -> the (m, n) float32 matrix that a
    reader gets back, lazy."""

    tensors: list[mx.array]
    records: dict[str, dict]
    weights: dict[str, mx.array]


class ModuleRunner:
    """Carries out a plan, one unit at a time."""

    def __init__(self, source: Source, plan: Plan, calibration: Calibration | None):
        self.source, self.plan = source, plan
        self.scoring = Scoring(plan.scorer, plan.importance_window, calibration)
        self.partners = PartnerReader(source, plan)

    def _linear(self, unit: Unit):
        return None if unit.linear_index is None else self.source.linears[unit.linear_index]

    def read(self, stream: TensorStream, units: list[Unit]) -> Iterator[Job]:
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
            yield Job(unit, tensors, weights, low_rank, partners)

    def decompose(self, job: Job) -> tuple[Job, dict[str, list[LowRank] | SlicedMatrix]]:
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
                    target = weight if score.target is None else score.target
                    matrices[p.name] = decompose_projection(target, plan, score, dtype)
        return job, matrices

    def _is_fitted(self, plan: ProjectionPlan) -> bool:
        """Truncated, or quantized with statistics to round by."""
        quantized = plan.quantization is not None and plan.quantization.mode == "affine"
        return plan.changed or (quantized and self.scoring.calibrated(plan.projection))

    def store(self, job: Job, matrices: dict[str, list[LowRank] | SlicedMatrix]) -> Stored:
        """Main thread: cast, quantize, measure."""
        linear = self._linear(job.unit)
        if linear is None:
            return Stored(self._store_module(job), {}, {})
        dtype = target_dtype(job.tensors["weight"].dtype, self.plan.dtype)
        biases = linear.split(job.tensors["bias"]) if "bias" in job.tensors else {}
        stored, record, reads = {}, {}, {}
        for p in linear.projections:
            plan, weight = self.plan.by_path[p.path], job.weights[p.name]
            matrix, noted = matrices.get(p.name), {}
            if isinstance(matrix, SlicedMatrix):
                tensors, read, noted = store_sliced(matrix, dtype, plan.quantization)
            else:
                tensors, read = self._store_projection(
                    plan, weight, matrix, biases.get(p.name), dtype
                )
            stored[p.name], reads[p.name] = tensors, read
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
            return Stored(joined, record, reads)
        tensors = [tensor for tensors in stored.values() for tensor in tensors]
        return Stored(tensors, record, reads)

    def _store_module(self, job: Job) -> list[mx.array]:
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


def _stored_as_it_is(plan: ProjectionPlan, job: Job, dtype: mx.Dtype) -> bool:
    """Nothing is truncated, quantized or cast, so there is no error to measure."""
    if plan.changed or plan.quantization is not None:
        return False
    return all(tensor.dtype == dtype for tensor in job.tensors.values())


def _energy(matrices: list[LowRank] | None) -> float:
    """Share of the energy that the ranks keep, over all heads; 1 if nothing was truncated."""
    total = sum(m.energy for m in matrices) if matrices else 0.0
    return sum(m.kept for m in matrices) / total if total else 1.0
