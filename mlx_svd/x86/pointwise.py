"""Activations and logsumexp by numpy, as differentiable functions of MLX arrays.

They compute at once: their inputs are evaluated, so they cannot stand inside ``mx.compile``.
All arrays are float32.
"""

import mlx.core as mx
import numpy as np

from mlx_svd.x86.workers import in_blocks

# Values worked on at a time: what numpy writes between two steps stays in the processor's cache.
_BLOCK = 1 << 15
_HALF = np.float32(0.5)
# sqrt(2 / pi) and the cubic term of Hendrycks and Gimpel, 2016
_GELU_SLOPE, _GELU_CUBE = np.float32(0.7978845608028654), np.float32(0.044715)


@mx.custom_function
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x, both (..., N)."""
    gates, xs = _flat(gate), _flat(x)
    found = np.empty(gates.shape, np.float32)

    def block(part: slice) -> None:
        out = found[part]
        _one_plus_exp(gates[part], out)
        np.divide(gates[part], out, out=out)
        out *= xs[part]

    in_blocks(block, gates.size, _BLOCK)
    return _shaped(found, gate)


@swiglu.vjp
def _swiglu_vjp(primals, cotangent, _):
    gates, xs, cts = (_flat(array) for array in (*primals, cotangent))
    d_gate, d_x = np.empty(gates.shape, np.float32), np.empty(gates.shape, np.float32)

    def block(part: slice) -> None:
        g, ct, slope = gates[part], cts[part], d_gate[part]
        _one_plus_exp(g, slope)
        np.reciprocal(slope, out=slope)
        silu = g * slope
        np.multiply(ct, silu, out=d_x[part])
        # With s = sigmoid(gate), the derivative of silu is s + silu - silu * s.
        silu -= silu * slope
        slope += silu
        slope *= ct
        slope *= xs[part]

    in_blocks(block, gates.size, _BLOCK)
    return _shaped(d_gate, primals[0]), _shaped(d_x, primals[1])


@mx.custom_function
def gelu_approx(x: mx.array) -> mx.array:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), of any shape."""
    xs = _flat(x)
    found = np.empty(xs.shape, np.float32)

    def block(part: slice) -> None:
        out = found[part]
        _gelu_tanh(xs[part], out)
        out += 1
        out *= xs[part]
        out *= _HALF

    in_blocks(block, xs.size, _BLOCK)
    return _shaped(found, x)


@gelu_approx.vjp
def _gelu_approx_vjp(x, cotangent, _):
    xs, cts = _flat(x), _flat(cotangent)
    found = np.empty(xs.shape, np.float32)

    def block(part: slice) -> None:
        v, slope = xs[part], found[part]
        _gelu_tanh(v, slope)
        inner = _GELU_SLOPE * (1 + 3 * _GELU_CUBE * v * v)
        rise = v * inner * (1 - slope * slope)
        slope += 1
        slope += rise
        slope *= _HALF
        slope *= cts[part]

    in_blocks(block, xs.size, _BLOCK)
    return _shaped(found, x)


@mx.custom_function
def logsumexp(logits: mx.array) -> mx.array:
    """log(sum(exp(logits))) over the last axis: (..., V) -> (...); sums in float64."""
    return _shaped(log_normalizers(_rows(logits)).astype(np.float32), logits[..., 0])


@logsumexp.vjp
def _logsumexp_vjp(logits, cotangent, result):
    return _shaped(_scaled_softmax(_rows(logits), _flat(result), _flat(cotangent)), logits)


@mx.custom_function
def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """-log P(target) in nats: (..., V), integer (...) -> (...)."""
    rows, words = _rows(logits), _flat(targets)
    losses = log_normalizers(rows) - rows[np.arange(len(rows)), words]
    return _shaped(losses.astype(np.float32), targets)


@cross_entropy.vjp
def _cross_entropy_vjp(primals, cotangent, losses):
    logits, targets = primals
    rows, words, cts = _rows(logits), _flat(targets), _flat(cotangent)
    places = np.arange(len(rows))
    found = _scaled_softmax(rows, _flat(losses) + rows[places, words], cts)
    found[places, words] -= cts
    return _shaped(found, logits), mx.zeros_like(targets)


def log_normalizers(rows: np.ndarray) -> np.ndarray:
    """log(sum(exp(row))) of every row of (n, V) float32, float64; NaN where a row has one."""
    found = np.empty(len(rows))

    def block(part: slice) -> None:
        largest = rows[part].max(axis=1)
        shifted = rows[part] - largest[:, None]
        np.exp(shifted, out=shifted)
        found[part] = largest + np.log(shifted.sum(axis=1, dtype=np.float64))

    in_blocks(block, len(rows), max(1, _BLOCK // rows.shape[1]))
    return found


def _scaled_softmax(rows: np.ndarray, sums: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """exp(rows - sums) * factors, of rows (n, V) and sums, factors (n,)."""
    found = np.empty(rows.shape, np.float32)

    def block(part: slice) -> None:
        out = found[part]
        np.subtract(rows[part], sums[part, None], out=out)
        np.exp(out, out=out)
        out *= factors[part, None]

    in_blocks(block, len(rows), max(1, _BLOCK // rows.shape[1]))
    return found


def _flat(array: mx.array) -> np.ndarray:
    return np.asarray(array).reshape(-1)


def _rows(array: mx.array) -> np.ndarray:
    return np.asarray(array).reshape(-1, array.shape[-1])


def _shaped(found: np.ndarray, like: mx.array) -> mx.array:
    return mx.array(found.reshape(like.shape))


def _one_plus_exp(gates: np.ndarray, out: np.ndarray) -> None:
    """1 + exp(-gates); infinity for large negative gates is right: their silu is 0."""
    np.negative(gates, out=out)
    np.exp(out, out=out)
    out += 1


def _gelu_tanh(x: np.ndarray, out: np.ndarray) -> None:
    np.multiply(x, x, out=out)
    out *= _GELU_CUBE
    out += 1
    out *= x
    out *= _GELU_SLOPE
    np.tanh(out, out=out)
