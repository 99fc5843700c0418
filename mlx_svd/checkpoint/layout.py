"""Which tensors a module stores in a checkpoint, with shapes, dtypes and exact bytes.

The plan counts bytes with these functions, the writer writes its headers from them before any
weight is known, and the compressor checks its results against them.
"""

from dataclasses import asdict, dataclass
from math import prod

import mlx.core as mx

from mlx_svd.errors import MlxSvdError

# Of config.json's ``mlx_svd`` section: a reader refuses a newer one.
CONFIG_FORMAT = 1
# In which unquantized tensors are stored, and models are run.
DTYPES = ("float32", "float16", "bfloat16")
FORMS = ("dense", "factored", "pivot", "corrected", "sliced")
# Below 8 bits the coefficients of the pivot form lose the matrix (about 40 % error at 4 bits).
PIVOT_MIN_BITS = 8

# mlx-lm's quantization modes: default group size, default bits, allowed (group size, bits).
_AFFINE = {(g, b) for g in (32, 64, 128) for b in (2, 3, 4, 5, 6, 8)}
MODES = {
    "affine": (64, 4, _AFFINE),
    "mxfp4": (32, 4, {(32, 4)}),
    "nvfp4": (16, 4, {(16, 4)}),
    "mxfp8": (32, 8, {(32, 8)}),
}


@dataclass(frozen=True)
class Quantization:
    """mlx-lm's quantization of one module: bits and group size along the input, mode."""

    group_size: int
    bits: int
    mode: str = "affine"

    def config(self) -> dict:
        """As config.json's ``quantization`` records it."""
        return asdict(self)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape can be cut into groups along its last dimension."""
        return shape[-1] % self.group_size == 0


def quantization(
    bits: int | None = None, group_size: int | None = None, mode: str = "affine"
) -> Quantization:
    """With mlx-lm's defaults for what is left out; MlxSvdError for what MLX cannot do."""
    if mode not in MODES:
        raise MlxSvdError(f"--q-mode {mode}: use one of {', '.join(MODES)}")
    default_group_size, default_bits, allowed = MODES[mode]
    chosen = Quantization(group_size or default_group_size, bits or default_bits, mode)
    if (chosen.group_size, chosen.bits) not in allowed:
        raise MlxSvdError(
            f"--q-bits {chosen.bits} with --q-group-size {chosen.group_size}: {mode} allows "
            f"bits {', '.join(map(str, sorted({b for _, b in allowed})))} and group sizes "
            f"{', '.join(map(str, sorted({g for g, _ in allowed})))}"
        )
    return chosen


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.size


def linear_tensors(
    path: str, shape: tuple[int, int], dtype: mx.Dtype, q: Quantization | None
) -> list[TensorSpec]:
    """A weight (m, n) at ``path``: one tensor, or MLX's packed weight, scales and biases.

    As in mlx-lm, a weight whose n is no multiple of the group size stays unquantized.
    """
    if not q or not q.fits(shape):
        return [TensorSpec(f"{path}.weight", tuple(shape), dtype)]
    m, n = shape
    groups = n // q.group_size
    packed = TensorSpec(f"{path}.weight", (m, n * q.bits // 32), mx.uint32)
    if q.mode != "affine":
        return [packed, TensorSpec(f"{path}.scales", (m, groups), mx.uint8)]
    return [
        packed,
        TensorSpec(f"{path}.scales", (m, groups), dtype),
        TensorSpec(f"{path}.biases", (m, groups), dtype),
    ]


def low_rank_tensors(
    path: str,
    form: str,
    shape: tuple[int, int],
    rank: int,
    bias: bool,
    dtype: mx.Dtype,
    q: Quantization | None,
    factors: Quantization | None = None,
) -> list[TensorSpec]:
    """A projection (m, n) in ``form`` at one rank; ``dense`` and ``sliced`` ignore the rank (shape
    is that of the sliced matrix), and a pivot form in which all m rows are pivots is the dense
    matrix. factors: quantization of the factors of a
    corrected form, whose base is quantized as ``q`` says."""
    m, n = shape
    if form == "corrected":
        tensors, holder = linear_tensors(f"{path}.base", shape, dtype, q), f"{path}.base"
        tensors += linear_tensors(f"{path}.down", (rank, n), dtype, factors)
        tensors += linear_tensors(f"{path}.up", (m, rank), dtype, factors)
    elif form in ("dense", "sliced") or (form == "pivot" and rank == m):
        tensors, holder = linear_tensors(path, shape, dtype, q), path
    else:
        tensors = linear_tensors(f"{path}.down", (rank, n), dtype, q)
        if form == "factored":
            tensors += linear_tensors(f"{path}.up", (m, rank), dtype, q)
            holder = f"{path}.up"
        else:
            tensors += linear_tensors(f"{path}.up", (m - rank, rank), dtype, q)
            tensors.append(TensorSpec(f"{path}.order", (m,), mx.uint32))
            holder = path
    if bias:
        tensors.append(TensorSpec(f"{holder}.bias", (m,), dtype))
    return tensors


def projection_tensors(
    path: str,
    form: str,
    shape: tuple[int, int],
    ranks: tuple[int, ...],
    bias: bool,
    dtype: mx.Dtype,
    q: Quantization | None,
    factors: Quantization | None = None,
) -> list[TensorSpec]:
    """A projection with one rank for the whole matrix, or one for each head."""
    if form == "dense" or len(ranks) == 1:
        return low_rank_tensors(path, form, shape, ranks[0], bias, dtype, q, factors)
    rows = (shape[0] // len(ranks), shape[1])
    return [
        tensor
        for head, rank in enumerate(ranks)
        for tensor in low_rank_tensors(
            f"{path}.heads.{head}", form, rows, rank, bias, dtype, q, factors
        )
    ]


def total_bytes(tensors: list[TensorSpec]) -> int:
    """Bytes of tensor data."""
    return sum(tensor.nbytes for tensor in tensors)


def rank_text(ranks: tuple[int, ...] | None, limit: int) -> str:
    """Ranks for a table: '57/64', '31-57/64 x12' for heads, 'full' if not truncated."""
    if ranks is None:
        return "full"
    low, high = min(ranks), max(ranks)
    heads = f" x{len(ranks)}" if len(ranks) > 1 else ""
    return f"{low if low == high else f'{low}-{high}'}/{limit}{heads}"
