"""Prototype of a faster ``decompose`` + truncation: float32 LAPACK that is checked, float64 else.

Four savings over ``numpy.linalg.eigh`` of the float64 Gram matrix:

1. Half of the eigenvectors are enough. With T the bottom k - r of them, U_r U_r^T W = W - T T^T W,
   so only the smaller side is transformed back and multiplied.
2. The Gram matrix, its reduction to tridiagonal form and divide and conquer run in float32.
   Rounding mixes eigenvectors i and j by about delta / (l_i - l_j), delta = DELTA eps l_1, which
   predicts the excess error of the rank from the eigenvalues alone. Over the limit: float64.
3. A few leading singular vectors are found by subspace iteration and moved out of the way first.
   They make l_1 large; without them, delta is that of the rest, and outliers need no float64.
4. The pivot rows are found on T: the rows that are no pivots of U_r are the pivots of T (the
   complementary minors of an orthogonal matrix are equal).
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.linalg
from scipy.linalg import cython_lapack

EXCESS_LIMIT = 3e-6
# RMS entry of the backward error of the float32 route in the eigenbasis, in eps * l_1. Measured
# 0.08 to 0.17 for k = 256 to 2048; the excess error goes with its square.
DELTA = 0.3
# Leading vectors that are looked for, and how many times the mean of the rest makes one an outlier.
SOUGHT, DEFLATED, OUTLIER, ITERATIONS = 16, 12, 10.0, 3
# Norm of the rounding errors in products of orthonormal float32 matrices, in eps.
ROUNDING = 30.0
_BLOCK = 64


# -- LAPACK ---------------------------------------------------------------------------------------


@cache
def _lapack(name: str):
    """A LAPACK routine of scipy's BLAS. ctypes releases the GIL; scipy's own wrappers do not."""
    capsule = cython_lapack.__pyx_capi__[name]
    api = ctypes.pythonapi
    get_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", api))
    get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", api)
    )
    signature = get_name(capsule)
    arguments = [ctypes.c_void_p] * (signature.count(b",") + 1)
    return ctypes.CFUNCTYPE(None, *arguments)(get_pointer(capsule, signature))


def _call(name: str, *arguments: bytes | int | np.ndarray) -> None:
    """Call a routine whose last argument, info, is added here; LinAlgError if it is not 0."""
    info = ctypes.c_int(0)
    values = [_value(argument) for argument in arguments] + [info]
    pointers = [
        v.ctypes.data if isinstance(v, np.ndarray) else ctypes.addressof(v) for v in values
    ]
    _lapack(name)(*pointers)
    if info.value:
        raise np.linalg.LinAlgError(f"{name}: info {info.value}")


def _value(argument: bytes | int | np.ndarray):
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        return argument
    if isinstance(argument, bytes):
        return ctypes.create_string_buffer(argument)
    return ctypes.c_int(argument)


def _kind(dtype: np.dtype) -> str:
    return "s" if dtype == np.float32 else "d"


@dataclass
class Reduced:
    """G = Q T Q^T: Q as LAPACK's reflectors, T's eigenvalues (ascending) and, as rows, vectors."""

    reflectors: np.ndarray
    tau: np.ndarray
    eigenvalues: np.ndarray
    vectors: np.ndarray

    def back(self, first: int, last: int) -> np.ndarray:
        """Eigenvectors first..last - 1 of G as rows, (last - first, k)."""
        k, z = len(self.tau), np.ascontiguousarray(self.vectors[first:last])
        if not len(z):
            return z
        work = np.empty(_BLOCK * (max(k, len(z)) + _BLOCK), z.dtype)
        arguments = (b"L", b"L", b"N", k, len(z), self.reflectors, k, self.tau, z, k)
        _call(f"{_kind(z.dtype)}ormtr", *arguments, work, work.size)
        return z


def reduce(gram: np.ndarray) -> Reduced:
    """Eigen-decomposition of a symmetric (k, k) matrix, which is overwritten; its dtype is kept.

    The workspace sizes are those of the documentation: asking LAPACK for them fails in float32
    from k = 2895 on (the size comes back rounded).
    """
    k, dtype, kind = len(gram), gram.dtype, _kind(gram.dtype)
    d, e, tau = (np.zeros(k, dtype) for _ in range(3))
    work = np.empty(_BLOCK * k, dtype)
    _call(f"{kind}sytrd", b"L", k, gram, k, d, e, tau, work, work.size)
    z = np.empty((k, k), dtype)
    work = np.empty(1 + 4 * k + k * k, dtype)
    integers = np.empty(3 + 5 * k, np.int32)
    _call(f"{kind}stedc", b"I", k, d, e, z, k, work, work.size, integers, integers.size)
    return Reduced(gram, tau, d, z)


# -- outliers -------------------------------------------------------------------------------------


def leading(a: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Outlying left singular vectors of a (k, n), k <= n, as columns, their energies, and the
    energy of the next one; at most ``most``, and none if no energy stands out."""
    k = len(a)
    if most < 1 or k < 4 * SOUGHT:
        return a[:, :0], np.zeros(0), 0.0
    q = np.random.default_rng(0).standard_normal((a.shape[1], SOUGHT), dtype=np.float32)
    q = np.linalg.qr(a @ q)[0]
    for _ in range(ITERATIONS):
        rows = a.T @ q
        if not _outliers(np.square(rows.astype(np.float64)).sum(axis=0), a):
            return a[:, :0], np.zeros(0), 0.0
        q = np.linalg.qr(a @ rows)[0]
    rows = (a.T @ q).astype(np.float64)
    values, mix = np.linalg.eigh(rows.T @ rows)
    values, q = values[::-1], (q @ mix[:, ::-1]).astype(a.dtype)
    count = min(most, DEFLATED, _outliers(values, a))
    return q[:, :count], values[:count], float(values[count])


def _outliers(energies: np.ndarray, a: np.ndarray) -> int:
    rest = float(np.vdot(a, a)) - energies.sum()
    return int((energies > OUTLIER * max(rest, 0.0) / len(a)).sum())


# -- truncation -----------------------------------------------------------------------------------


def predicted_excess(eigenvalues: np.ndarray, outliers: np.ndarray, rank: int) -> float:
    """Excess error of the float32 route at this rank.

    eigenvalues: of the Gram matrix without the outliers, ascending; outliers: their energies.
    Three causes: rounding of the reduction (delta), outliers that the subspace iteration has not
    separated from the tail, and rounding of the products beside a much smaller tail.
    """
    values = eigenvalues.astype(np.float64)
    eps = float(np.finfo(np.float32).eps)
    delta = DELTA * eps * values[-1]
    tail, top = values[: len(values) - rank], values[len(values) - rank :]
    lost = tail.sum() - len(tail) * delta
    if not len(tail) or values[-1] <= 0:
        return 0.0
    if lost <= 0:
        return float("inf")
    mixed = sum((delta**2 / np.maximum(top - t, delta)).sum() for t in tail)
    ratios = np.maximum(tail, 0)[None, :] / outliers[:, None]
    coupled = SOUGHT * (outliers[:, None] * ratios ** (2 * ITERATIONS + 1)).sum()
    total = top.sum() + lost + outliers.sum()
    return float((mixed + coupled + (ROUNDING * eps) ** 2 * total) / (2 * lost))


@dataclass
class Truncation:
    """The best rank-r approximation of weight (m, n), k = min(m, n).

    basis: orthonormal rows of length k; tail: they span the dropped side, (k - r, k), not the
    kept one, (r, k); left: they are left singular vectors (m <= n).
    """

    weight: np.ndarray
    basis: np.ndarray
    tail: bool
    left: bool
    dtype: type
    predicted: float

    def truncated(self) -> np.ndarray:
        """Multiplied out, (m, n)."""
        w, b = self.weight, self.basis
        part = b.T @ (b @ w) if self.left else (w @ b.T) @ b
        return w - part if self.tail else part

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """up (m, r) and down (r, n) of a truncation that was made with the top basis."""
        assert not self.tail
        if self.left:
            return self.basis.T, self.basis @ self.weight
        return self.weight @ self.basis.T, self.basis

    def pivots(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """rows, coefficients and order of the pivot form; left only."""
        assert self.left
        b, m = self.basis, len(self.weight)
        r = m - len(b) if self.tail else len(b)
        # In float32 the pivots may differ from float64's; they are as good.
        triangle, permutation = scipy.linalg.qr(b, mode="r", pivoting=True, check_finite=False)
        first = len(b)
        solved = scipy.linalg.solve_triangular(
            triangle[:, :first], triangle[:, first:], check_finite=False
        )
        if self.tail:  # T_o^T W_o + T_s^T W_s = 0 for the others o and the pivots s
            others, chosen, coefficients = permutation[:first], permutation[first:], -solved
        else:
            chosen, others, coefficients = permutation[:first], permutation[first:], solved.T
        by_row, by_other = np.argsort(chosen), np.argsort(others)
        order = np.empty(m, dtype=np.uint32)
        order[chosen[by_row]] = np.arange(r)
        order[others[by_other]] = np.arange(r, m)
        kept = chosen[by_row]
        part = b[:, kept].T @ (b @ self.weight)
        rows = self.weight[kept] - part if self.tail else part
        return rows, coefficients[by_other][:, by_row], order


def decompose(
    weight: np.ndarray, rank: int, top: bool = False, exact: bool | None = None
) -> Truncation:
    """Truncate weight (m, n) to the rank. top: the kept basis is needed (factored form).

    exact: None decides by the prediction; True is float64; False is float32 unchecked.
    """
    weight = weight.astype(np.float32, copy=False)
    left = weight.shape[0] <= weight.shape[1]
    a = weight if left else weight.T
    found, predicted, outliers = None, 0.0, a[:, :0]
    if not exact:
        found, predicted, outliers = _float32(a, rank)
        if exact is None and predicted > EXCESS_LIMIT:
            found, outliers = None, a[:, :0]
    if found is None:
        a = a.astype(np.float64)
        weight, found = (a if left else a.T), reduce(a @ a.T)
    k = len(a)
    tail = rank > k // 2 and not top
    basis = found.back(0, k - rank) if tail else found.back(k - rank, k)
    if outliers.shape[1] and not tail:  # put the outliers themselves in place of their span
        basis[len(basis) - outliers.shape[1] :] = outliers.T[::-1]
        rest = basis[: len(basis) - outliers.shape[1]]
        rest -= (rest @ outliers) @ outliers.T
    return Truncation(weight, basis, tail, left, weight.dtype.type, predicted)


def _float32(a: np.ndarray, rank: int) -> tuple[Reduced, float, np.ndarray]:
    outliers, energies, following = leading(a, rank // 2)
    if outliers.shape[1]:
        rest = a - outliers @ (outliers.T @ a)
        gram = rest @ rest.T
        gram += (outliers * np.float32(2 * following)) @ outliers.T  # they stay on the top side
    else:
        gram = a @ a.T
    found = reduce(gram)
    return found, predicted_excess(found.eigenvalues, energies, rank), outliers
