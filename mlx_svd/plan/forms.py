"""Which of the stored forms is the smallest, and from which rank on factors pay at all."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_svd.checkpoint.layout import (
    PIVOT_MIN_BITS,
    Quantization,
    projection_tensors,
    total_bytes,
)
from mlx_svd.errors import MlxSvdError
from mlx_svd.source.families import Projection


@dataclass(frozen=True)
class Storage:
    """How the tensors of one projection are stored, whatever its form."""

    projection: Projection
    dtype: mx.Dtype
    quantize: Quantization | None
    factors: Quantization | None = None

    def nbytes(self, form: str, ranks: tuple[int, ...]) -> int:
        """Exact bytes of tensor data, bias included."""
        p = self.projection
        return total_bytes(
            projection_tensors(
                p.path, form, p.shape, ranks, p.bias, self.dtype, self.quantize, self.factors
            )
        )

    def break_even_rank(self, heads: int, multiple: int) -> int:
        """The largest rank (per head) at which the factored form is smaller than the dense one,
        a multiple of ``multiple``; 0 if there is none."""
        rows, columns = self.projection.shape[0] // heads, self.projection.shape[1]
        dense = self.nbytes("dense", (0,))
        low, high = 0, min(rows, columns) // multiple
        while low < high:
            middle = (low + high + 1) // 2
            if self.nbytes("factored", (middle * multiple,) * heads) < dense:
                low = middle
            else:
                high = middle - 1
        return low * multiple


@dataclass(frozen=True)
class FormChoice:
    """form, and why when it was not simply asked for; ranks None: the original weights are kept."""

    form: str
    ranks: tuple[int, ...] | None
    reason: str


def choose_form(asked: str, ranks: tuple[int, ...], storage: Storage) -> FormChoice:
    """The form to store a projection in at these ranks (one for the matrix, or one a head).

    ``auto`` takes the smallest form that reproduces the same rank-r matrix; the pivot form only
    unquantized, because quantization hurts it more than the others. A form asked for by name is
    taken even when it is larger than dense, and the reason says so. Raises MlxSvdError for the
    pivot form below 8 bits.
    """
    p, heads = storage.projection, len(ranks)
    rows = p.shape[0] // heads
    full = all(rank == min(rows, p.shape[1]) for rank in ranks)
    dense = storage.nbytes("dense", ranks)
    if asked == "pivot":
        _check_pivot_bits(p, storage.quantize)
        if full and rows <= p.shape[1]:
            return FormChoice("dense", None, "full rank: the pivot form is the matrix itself")
    if asked == "dense":
        return FormChoice("dense", None if full else ranks, "full rank" if full else "")
    if asked == "corrected":
        _check_corrected(p, storage.quantize, heads)
    if asked != "auto":
        size = storage.nbytes(asked, ranks)
        grown = size > dense and asked != "corrected"
        return FormChoice(asked, ranks, f"{size / dense:.0%} of dense" if grown else "")
    if full:
        return FormChoice("dense", None, "full rank: nothing to remove")
    forms = ["factored"] if storage.quantize else ["factored", "pivot"]
    sizes = {form: storage.nbytes(form, ranks) for form in forms}
    best = min(sizes, key=sizes.__getitem__)
    if sizes[best] >= dense:
        reason = f"truncated, stored dense: {best} would be {sizes[best] / dense:.0%} of it"
        return FormChoice("dense", ranks, reason)
    return FormChoice(best, ranks, "")


def _check_corrected(projection: Projection, q: Quantization | None, heads: int) -> None:
    if q is None or q.mode != "affine" or not q.fits(projection.shape):
        raise MlxSvdError(
            f"{projection.path}: the corrected form needs affine quantization and an input "
            "dimension that is a multiple of the group size; add -q, or use another form"
        )
    if heads > 1:
        raise MlxSvdError(
            f"{projection.path}: the corrected form corrects a whole matrix; use --whole-matrix"
        )


def _check_pivot_bits(projection: Projection, quantize: Quantization | None) -> None:
    if quantize and quantize.bits < PIVOT_MIN_BITS:
        raise MlxSvdError(
            f"{projection.path}: the pivot form cannot be stored in {quantize.bits} bits (it "
            "loses the matrix); use --form factored, or 8 bits"
        )
