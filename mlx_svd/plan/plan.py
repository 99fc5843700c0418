"""A plan: for every projection its form, ranks and bits, and the exact bytes of the result."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property

import mlx.core as mx

from mlx_svd.checkpoint.layout import Quantization, TensorSpec, rank_text, total_bytes
from mlx_svd.source.families import Projection

PLAN_FORMAT = 2


@dataclass(frozen=True)
class ProjectionPlan:
    """What happens to one projection.

    form: dense, factored, pivot, corrected or sliced; ranks: None = the original weights, otherwise
    one rank for the matrix or one for each head (of a corrected form: of the correction; of a
    sliced one: kept dimensions of a head, or neurons); limit: min(m, n), per head if there are
    several ranks (sliced: all dimensions or neurons); stored_shape: of a sliced matrix;
    break_even: largest rank at which factors are smaller than dense; quantization: of the form's
    matrices; factors: of the two factors of a corrected form; reason: why it is not what was asked
    for, or why it is left alone; loss: what a budget expects this choice to cost. Bytes include
    the bias: before (as the source stores it), dense (all of it at the plan's dtype and bits) and
    after.
    """

    projection: Projection
    form: str
    ranks: tuple[int, ...] | None
    limit: int
    break_even: int
    quantization: Quantization | None
    reason: str
    bytes_before: int
    bytes_dense: int
    bytes_after: int
    factors: Quantization | None = None
    loss: float | None = None
    stored_shape: tuple[int, int] | None = None

    @property
    def path(self) -> str:
        return self.projection.path

    @property
    def changed(self) -> bool:
        """Whether the weights are truncated (quantization alone does not count)."""
        return self.ranks is not None

    def rank_text(self) -> str:
        """'57/64', '31-57/64 x12' for heads, 'full' if not truncated."""
        return rank_text(self.ranks, self.limit)

    def to_json(self) -> dict:
        p = self.projection
        return {
            "path": p.path,
            "projection": p.name,
            "layer": p.layer,
            "shape": list(p.shape),
            "form": self.form,
            "ranks": list(self.ranks) if self.ranks else None,
            "rank_limit": self.limit,
            "break_even_rank": self.break_even,
            "quantization": asdict(self.quantization) if self.quantization else None,
            "factors": asdict(self.factors) if self.factors else None,
            "loss": self.loss,
            "reason": self.reason,
            "bytes_before": self.bytes_before,
            "bytes_dense": self.bytes_dense,
            "bytes_after": self.bytes_after,
        }


@dataclass(frozen=True)
class Unit:
    """One module of the source, the step in which a checkpoint is written and resumed.

    path: module path; sources: the source tensors it takes; tensors: what it stores, in order;
    linear_index: index in Source.linears if it holds projections, else None; quantization: of a
    module without projections.
    """

    path: str
    sources: tuple[str, ...]
    tensors: tuple[TensorSpec, ...]
    linear_index: int | None
    quantization: Quantization | None

    @property
    def nbytes(self) -> int:
        """Tensor data that it stores."""
        return total_bytes(list(self.tensors))


@dataclass(frozen=True)
class Plan:
    """Everything that the compressor needs besides the weights.

    scorer: what orders the components; calibration: digest, text and size of the calibration it
    rests on, None if it needs none; modules: quantization of modules without projections that
    differ from ``quantize``.
    """

    base_model: str
    revision: str | None
    model_type: str
    compressible: tuple[str, ...]
    quantize: Quantization | None
    rank_multiple: int | None
    dtype: str | None
    scorer: str
    calibration: dict | None
    importance_window: int | None
    modules: dict[str, Quantization | None]
    projections: tuple[ProjectionPlan, ...]
    units: tuple[Unit, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    bytes_before: int

    @cached_property
    def tensors(self) -> list[TensorSpec]:
        """Every tensor of the checkpoint, in the order of the files."""
        return [tensor for unit in self.units for tensor in unit.tensors]

    @property
    def bytes_after(self) -> int:
        """Tensor data of the whole checkpoint."""
        return total_bytes(self.tensors)

    @cached_property
    def by_path(self) -> dict[str, ProjectionPlan]:
        return {p.path: p for p in self.projections}

    def to_json(self) -> dict:
        """The saved plan; ``--config`` takes it and repeats it exactly."""
        touched = [p for p in self.projections if p.changed]
        return {
            "plan_format": PLAN_FORMAT,
            "base_model": self.base_model,
            "revision": self.revision,
            "model_type": self.model_type,
            "compressible": list(self.compressible),
            "quantize": asdict(self.quantize) if self.quantize else None,
            "rank_multiple": self.rank_multiple,
            "dtype": self.dtype,
            "scorer": self.scorer,
            "calibration": self.calibration,
            "importance_window": self.importance_window,
            "modules": {k: asdict(q) if q else None for k, q in self.modules.items()},
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "touched_bytes_before": sum(p.bytes_before for p in touched),
            "touched_bytes_after": sum(p.bytes_after for p in touched),
            "projections": [p.to_json() for p in self.projections],
            "dropped_tensors": list(self.dropped),
            "notes": list(self.notes),
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the saved plan: equal digests mean equal plans."""
        canonical = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def target_dtype(source: mx.Dtype, dtype: str | None) -> mx.Dtype:
    """The dtype in which a source tensor is stored."""
    return getattr(mx, dtype) if dtype else source
