"""A weight matrix -> the matrices of its form, fitted to the statistics of its inputs.

Numpy only: runs in worker threads.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_svd.calibrate.scorers import Score
from mlx_svd.checkpoint.layout import Quantization
from mlx_svd.linalg.pivot import pivot_form
from mlx_svd.linalg.rotate import rotate
from mlx_svd.linalg.rounding import Rounded, round_compensated
from mlx_svd.linalg.spectrum import energy_kept
from mlx_svd.linalg.truncate import Decomposition


@dataclass(frozen=True)
class Form:
    """How one matrix is stored.

    name: dense, factored, pivot or corrected; rank: None = not truncated; quantization: of its
    matrices; factors: of the factors of a corrected form; stored: rounds an array to the dtype in
    which tensors are stored.
    """

    name: str
    rank: int | None
    quantization: Quantization | None
    factors: Quantization | None
    stored: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class LowRank:
    """One matrix in its form: dense (m, n) as "weight", or "down" and "up", with "order" (pivot)
    or "base" (corrected); float32, or already rounded to bits.

    energy: total cost of all components; kept: of those that the rank keeps.
    """

    parts: dict[str, np.ndarray | Rounded]
    energy: float
    kept: float


def fit(weight: np.ndarray, form: Form, score: Score, name: str) -> LowRank:
    """The stored matrices of W (m, n) float32 in ``form``.

    With statistics in ``score``, quantized matrices are rounded so that each error is undone by
    the inputs after it, and the second factor is fitted to the first as it is stored. Without,
    they are left to MLX's own rounding. name: seeds the rotation of quantized factors.
    """
    weight = weight.astype(np.float64, copy=False)
    seed = zlib.crc32(name.encode())
    if form.rank is None:
        kept = {"weight": _rounded(weight, score.second, form.quantization, form)}
        return LowRank(_float32(kept), 1, 1)
    if form.name == "corrected":
        return _corrected(weight, form, score, seed)
    d = score.decompose(weight, form.rank)
    if form.name == "dense" or (form.name == "pivot" and form.rank == len(weight)):
        parts = {"weight": _rounded(d.truncated(form.rank), score.second, form.quantization, form)}
    elif form.name == "factored":
        parts = _factors(d, form, score, seed)
    else:
        parts = _pivot(d, form, score)
    energy = float(d.energies.sum())
    return LowRank(_float32(parts), energy, energy * energy_kept(d.energies, form.rank))


def rounding_to(dtype: mx.Dtype) -> Callable[[np.ndarray], np.ndarray]:
    """Rounds float64 arrays to the values of a stored dtype (float32, float16, bfloat16)."""
    if dtype == mx.bfloat16:  # numpy has none: round to nearest even on the upper 16 bits
        return _to_bfloat16
    kind = np.float16 if dtype == mx.float16 else np.float32
    return lambda values: values.astype(kind).astype(np.float64)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def dense(low: LowRank) -> np.ndarray:
    """The matrix (m, n) that the parts make, float64 (rounding to the stored dtype not included
    where a part is not quantized)."""
    read = {k: p.dense() if isinstance(p, Rounded) else p for k, p in low.parts.items()}
    if "weight" in read:
        return read["weight"].astype(np.float64, copy=False)
    product = read["up"].astype(np.float64) @ read["down"]
    if "base" in read:
        return read["base"] + product
    if "order" in read:
        return np.concatenate([read["down"], product])[read["order"]]
    return product


def _corrected(weight: np.ndarray, form: Form, score: Score, seed: int) -> LowRank:
    """A quantized base, and the best rank-r approximation of what quantization lost (QERA,
    arXiv 2410.06040; EoRA, arXiv 2410.21271)."""
    # Without statistics to the nearest code; the base must be known before its error is.
    second = np.eye(weight.shape[1]) if score.second is None else score.second
    base = _rounded(weight, second, form.quantization, form)
    d = score.decompose(weight - base.dense())
    parts = _factors(d, form, score, seed)
    # In the metric the shares are of the weight's own total, as for the other forms.
    total = score.loss(weight)
    left = float(d.energies[form.rank :].sum())
    return LowRank(_float32({"base": base, **parts}), total, total - left)


def _factors(
    d: Decomposition, form: Form, score: Score, seed: int
) -> dict[str, np.ndarray | Rounded]:
    """up and down; balanced, rotated when they are quantized, the second fitted to the first."""
    q = form.factors if form.name == "corrected" else form.quantization
    up, down = d.balanced_factors(form.rank)
    if q is None:
        return {"down": down, "up": up}
    up, down = rotate(up, down, seed)
    return _fitted(d.weight, up, down, score.second, q, form)


def _pivot(d: Decomposition, form: Form, score: Score) -> dict[str, np.ndarray | Rounded]:
    pivot = pivot_form(d, form.rank)
    order = pivot.order
    # Where the rows that are no pivots stand in the matrix, in the order of the coefficients.
    others = np.argsort(order)[form.rank :]
    fitted = _fitted(
        d.weight[others], pivot.coefficients, pivot.rows, score.second, form.quantization, form
    )
    return {**fitted, "order": order}


def _fitted(
    target: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    second: np.ndarray | None,
    q: Quantization | None,
    form: Form,
) -> dict[str, np.ndarray | Rounded]:
    """Quantized ``down``, then ``up`` refitted to the target in E[x x^T] and quantized."""
    stored_down = _rounded(down, second, q, form)
    if not isinstance(stored_down, Rounded):
        return {"down": down, "up": up}
    read = stored_down.dense()
    latent = read @ second @ read.T
    latent = latent + 1e-6 * np.trace(latent) / len(latent) * np.eye(len(latent))
    # Least squares for what the stored rows miss; up itself where they miss nothing.
    missed = target - up @ read
    up = up + np.linalg.solve(latent, read @ second @ missed.T).T
    return {"down": stored_down, "up": _rounded(up, latent, q, form)}


def _rounded(
    weight: np.ndarray, second: np.ndarray | None, q: Quantization | None, form: Form
) -> np.ndarray | Rounded:
    """Rounded with compensation if there are statistics and the mode has them, else as it is."""
    if second is None or q is None or q.mode != "affine" or not q.fits(weight.shape):
        return weight
    return round_compensated(weight, second, q.bits, q.group_size, form.stored)


def _float32(parts: dict[str, np.ndarray | Rounded]) -> dict[str, np.ndarray | Rounded]:
    return {
        key: part
        if isinstance(part, Rounded) or key == "order"
        else np.ascontiguousarray(part, dtype=np.float32)
        for key, part in parts.items()
    }
