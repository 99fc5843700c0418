"""One projection's weight -> its matrices, head by head where the plan says so."""

import mlx.core as mx
import numpy as np

from mlx_svd.calibrate.fit import Form, LowRank, fit, rounding_to
from mlx_svd.calibrate.scorers import Score
from mlx_svd.plan.plan import ProjectionPlan
from mlx_svd.plan.spectra import head_rows


def decompose_projection(
    weight: np.ndarray, plan: ProjectionPlan, score: Score, dtype: mx.Dtype
) -> list[LowRank]:
    """The matrices of a projection: one, or one for each head.

    weight: (m, n) float32; plan: with ranks, or dense and quantized; dtype: in which unquantized
    tensors, scales and biases are stored.
    """
    ranks = plan.ranks or (None,)
    # Dense heads are joined before they are quantized.
    joined = plan.form == "dense" and len(ranks) > 1
    quantization = None if joined else plan.quantization
    heads = head_rows(weight, len(ranks))
    rows = len(heads[0])
    return [
        fit(
            head,
            Form(plan.form, rank, quantization, plan.factors, rounding_to(dtype)),
            score.rows(slice(index * rows, (index + 1) * rows)) if len(ranks) > 1 else score,
            f"{plan.path}.{index}",
        )
        for index, (head, rank) in enumerate(zip(heads, ranks, strict=True))
    ]
