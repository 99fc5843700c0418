"""Sliced projections of a run: the partners' weights, the sliced matrix, and what is stored."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_svd.calibrate.fit import Form, LowRank, fit, rounding_to
from mlx_svd.calibrate.scorers import Score
from mlx_svd.calibrate.sliced import Affine, Sliced, slice_member
from mlx_svd.calibrate.statistics import Statistics
from mlx_svd.checkpoint.layout import Quantization
from mlx_svd.compress.store import store_part, to_numpy
from mlx_svd.plan.plan import Plan, ProjectionPlan
from mlx_svd.source.families import Projection
from mlx_svd.source.slices import SliceGroup, slice_groups
from mlx_svd.source.source import Source


@dataclass(frozen=True)
class SlicedMatrix:
    """A sliced projection before it is stored: sliced, and its weight in the form of the plan."""

    sliced: Sliced
    fitted: LowRank


class PartnerReader:
    """Reads the weights that decide how a projection is sliced, beside the run's own stream.

    Keeps those of one layer, because gate and up ask for the same down projection. A partner is
    always read anew, whatever an earlier run has done, so that a continued run slices alike.
    """

    def __init__(self, source: Source, plan: Plan):
        self.plan = plan
        self.groups = slice_groups(source.linears)
        self.linears = {linear.path: linear for linear in source.linears}
        sliced = any(p.form == "sliced" for p in plan.projections)
        self.stream = source.stream() if sliced else None
        self.kept: dict[str, Affine] = {}
        self.layer = -1

    def matrices(self, p: Projection, weight: np.ndarray, bias: mx.array | None) -> dict:
        """Name -> Affine of ``p``, given as it was read, and of its partners."""
        if p.layer != self.layer:
            self.kept, self.layer = {}, p.layer
        found = {p.name: Affine(weight, None if bias is None else to_numpy(bias))}
        for partner in self.groups[p.path].partners(p.name):
            if partner.path not in self.kept:
                self.kept[partner.path] = self._read(partner)
            found[partner.name] = self.kept[partner.path]
        return found

    def _read(self, p: Projection) -> Affine:
        linear = self.linears[p.module]
        weight = linear.split(self.stream.take(f"{p.module}.weight"))[p.name]
        bias = linear.split(self.stream.take(f"{p.module}.bias"))[p.name] if p.bias else None
        return Affine(to_numpy(weight), None if bias is None else to_numpy(bias))


def slice_matrix(
    group: SliceGroup,
    plan: ProjectionPlan,
    matrices: dict[str, Affine],
    statistics: Callable[[Projection], Statistics],
    score: Score,
    dtype: mx.Dtype,
) -> SlicedMatrix:
    """Slice one projection and round it as the plan says; numpy only, for worker threads."""
    sliced = slice_member(group, plan.projection, plan.ranks[0], matrices, statistics)
    form = Form("dense", None, plan.quantization, None, rounding_to(dtype))
    # Rounding is compensated in the moments of the inputs that are left.
    rounding = replace(score, second=sliced.second)
    fitted = fit(sliced.weight.astype(np.float32), form, rounding, plan.path)
    return SlicedMatrix(sliced, fitted)


def store_sliced(
    matrix: SlicedMatrix, dtype: mx.Dtype, q: Quantization | None
) -> tuple[list[mx.array], mx.array, dict]:
    """Tensors of weight and bias, the (m, n) float32 matrix that they stand for, and what
    config.json records: energy, and the kept rotary pairs of queries and keys."""
    sliced = matrix.sliced
    part = matrix.fitted.parts["weight"]
    part = np.ascontiguousarray(part, dtype=np.float32) if isinstance(part, np.ndarray) else part
    tensors, read = store_part(part, dtype, q)
    if sliced.bias is not None:
        tensors = [*tensors, mx.array(sliced.bias.astype(np.float32)).astype(dtype)]
    record = {"energy": sliced.kept}
    if sliced.pairs is not None:
        record["pairs"] = list(sliced.pairs)
    lifted = sliced.lift(np.array(read).astype(np.float64))
    return tensors, mx.array(lifted.astype(np.float32)), record
