"""One projection's weight -> the matrices of its form. Numpy only: runs in worker threads."""

import zlib
from dataclasses import dataclass

import numpy as np

from mlx_svd.linalg.pivot import pivot_form
from mlx_svd.linalg.rotate import rotate
from mlx_svd.linalg.spectrum import energy_kept
from mlx_svd.linalg.truncate import Decomposition, decompose
from mlx_svd.plan.plan import ProjectionPlan
from mlx_svd.plan.spectra import head_rows


@dataclass(frozen=True)
class LowRank:
    """One matrix in its form, float32: dense (m, n), or up and down, or those and order.

    energy: total sum(sigma^2) of the original; kept: what the rank keeps of it.
    """

    parts: dict[str, np.ndarray]
    energy: float
    kept: float


def decompose_projection(weight: np.ndarray, plan: ProjectionPlan) -> list[LowRank]:
    """The low-rank matrices of a projection: one, or one for each head.

    weight: (m, n) float32; plan: with ranks. Factors that will be quantized are balanced and
    rotated, others only balanced.
    """
    heads = head_rows(weight, len(plan.ranks))
    rotated = plan.quantization is not None
    return [
        _low_rank(decompose(head), plan.form, rank, rotated, f"{plan.path}.{index}")
        for index, (head, rank) in enumerate(zip(heads, plan.ranks, strict=True))
    ]


def _low_rank(d: Decomposition, form: str, rank: int, rotated: bool, name: str) -> LowRank:
    if form == "dense" or (form == "pivot" and rank == d.weight.shape[0]):
        parts = {"weight": d.truncated(rank)}
    elif form == "factored":
        up, down = d.balanced_factors(rank)
        if rotated:
            up, down = rotate(up, down, seed=zlib.crc32(name.encode()))
        parts = {"down": down, "up": up}
    else:
        pivot = pivot_form(d, rank)
        parts = {"down": pivot.rows, "up": pivot.coefficients, "order": pivot.order}
    stored = {
        key: part if key == "order" else np.ascontiguousarray(part, dtype=np.float32)
        for key, part in parts.items()
    }
    energy = float(d.energies.sum())
    return LowRank(stored, energy, energy * energy_kept(d.energies, rank))
