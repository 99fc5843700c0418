"""Compensated rounding against MLX's own quantizer and a textbook column elimination."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.linalg.rounding import DAMPING, Rounded, _mlx_range, round_compensated


def exact(values: np.ndarray) -> np.ndarray:
    """Scales and biases stored in float32."""
    return values.astype(np.float32).astype(np.float64)


def second_moment(n: int, samples: int, seed: int = 0) -> np.ndarray:
    """E[x x^T] of strongly correlated inputs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, n // 4)) @ rng.standard_normal((n // 4, n))
    x += 0.3 * rng.standard_normal((samples, n))
    return x.T @ x / samples


def weight_of(m: int, n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, n))


def loss(error: np.ndarray, second: np.ndarray) -> float:
    return float(np.trace(error @ second @ error.T))


def mlx_rounded(weight: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """What MLX's own rounding to the nearest code gives back."""
    packed = mx.quantize(mx.array(weight.astype(np.float32)), group_size, bits)
    return np.array(mx.dequantize(*packed, group_size=group_size, bits=bits), dtype=np.float64)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_codes_are_read_by_mlx_as_what_dense_says(bits, group_size):
    weight = weight_of(5, 256)
    rounded = round_compensated(weight, second_moment(256, 600), bits, group_size, exact)
    assert rounded.codes.max() < 2**bits
    assert len(np.unique(rounded.codes)) > 2 ** min(bits, 6) // 2
    packed = rounded.packed(bits)
    assert (packed.dtype, packed.shape) == (np.uint32, (5, 256 * bits // 32))
    scales, biases = (mx.array(a.astype(np.float32)) for a in (rounded.scales, rounded.biases))
    read = mx.dequantize(mx.array(packed), scales, biases, group_size=group_size, bits=bits)
    np.testing.assert_allclose(np.array(read), rounded.dense(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_ranges_are_those_of_mlx(bits):
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((40, 64)).astype(np.float32)
    weight += np.linspace(-5, 5, 40, dtype=np.float32)[:, None]  # also groups of one sign
    scale, bias = _mlx_range(*(f(weight.astype(np.float64), 1) for f in (np.min, np.max)), bits)
    _, scales, biases = mx.quantize(mx.array(weight), 64, bits)
    np.testing.assert_allclose(scale, np.array(scales)[:, 0], rtol=1e-5)
    np.testing.assert_allclose(bias, np.array(biases)[:, 0], rtol=1e-5)


def textbook(
    weight: np.ndarray, second: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int
) -> np.ndarray:
    """Codes of optimal brain quantization in a fixed order: after each column the inverse Hessian
    loses its row and column by Gaussian elimination."""
    n = weight.shape[1]
    size = n // scales.shape[1]
    w = weight.copy()
    inverse = np.linalg.inv(second + DAMPING * np.trace(second) / n * np.eye(n))
    codes = np.empty(weight.shape)
    for i in range(n):
        scale, bias = scales[:, i // size], biases[:, i // size]
        codes[:, i] = np.clip(np.round((w[:, i] - bias) / scale), 0, 2**bits - 1)
        error = w[:, i] - (codes[:, i] * scale + bias)
        w -= np.outer(error / inverse[i, i], inverse[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("samples", [500, 20], ids=["regular", "singular"])
@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_those_of_the_textbook_elimination(bits, samples):
    weight, second = weight_of(9, 96), second_moment(96, samples)
    rounded = round_compensated(weight, second, bits, 32, exact)
    expected = textbook(weight, second, rounded.scales, rounded.biases, bits)
    np.testing.assert_array_equal(rounded.codes, expected)


@pytest.mark.parametrize("samples", [1000, 30], ids=["regular", "singular"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compensation_moves_the_outputs_less_than_rounding_to_the_nearest(bits, samples):
    weight, second = weight_of(24, 128), second_moment(128, samples)
    ours = round_compensated(weight, second, bits, 64, exact).dense()
    nearest = mlx_rounded(weight, bits, 64)
    assert loss(weight - ours, second) < 0.6 * loss(weight - nearest, second)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_without_correlations_shrunk_ranges_alone_are_no_worse_than_mlx(bits):
    weight = weight_of(24, 128)
    weight[:, 5] *= 4  # outliers, which are worth clipping
    ours = round_compensated(weight, np.eye(128), bits, 64, exact).dense()
    nearest = mlx_rounded(weight, bits, 64)
    assert np.linalg.norm(weight - ours) < np.linalg.norm(weight - nearest)


@pytest.mark.parametrize("kind", ["zeros", "one input", "two samples"])
def test_a_singular_second_moment_still_gives_codes_close_to_the_weights(kind):
    second = np.zeros((64, 64))
    if kind == "one input":
        second[7, 7] = 3.0
    elif kind == "two samples":
        x = weight_of(2, 64, seed=9)
        second = x.T @ x / 2
    weight = weight_of(6, 64)
    rounded = round_compensated(weight, second, 4, 32, exact)
    assert np.isfinite(rounded.dense()).all()
    assert np.abs(weight - rounded.dense()).max() < 1.0
    if kind == "one input":  # the only input that was seen is not moved by the others
        assert np.abs(weight - rounded.dense())[:, 7].max() <= np.abs(rounded.scales).max() / 2


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [0.0, 0.75, -3.0, 1e-9])
def test_constant_groups_come_back_as_they_were(value, bits):
    weight = np.full((3, 64), value)
    rounded = round_compensated(weight, second_moment(64, 200), bits, 32, exact)
    np.testing.assert_allclose(rounded.dense(), value, rtol=1e-6, atol=1e-7)


def test_zeros_stay_zeros_beside_other_groups():
    weight = weight_of(4, 64)
    weight[:, 32:] = 0
    weight[2] = 0
    rounded = round_compensated(weight, np.eye(64), 4, 32, exact)
    np.testing.assert_allclose(rounded.dense()[:, 32:], 0, atol=1e-6)
    np.testing.assert_allclose(rounded.dense()[2], 0, atol=1e-6)


def test_codes_fit_the_scales_as_they_are_stored():
    """Scales are rounded before the codes are chosen, not after."""

    def coarse(values: np.ndarray) -> np.ndarray:
        return np.float64(np.float16(np.round(values * 64) / 64))

    weight = 4 * weight_of(6, 64)
    rounded = round_compensated(weight, np.eye(64), 8, 64, coarse)
    for stored in (rounded.scales, rounded.biases):
        np.testing.assert_array_equal(stored, coarse(stored))
    steps = (weight - rounded.biases) / rounded.scales
    np.testing.assert_array_equal(rounded.codes, np.clip(np.rint(steps), 0, 255))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packing_is_little_endian_along_the_row(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 32)).astype(np.uint8)
    packed = Rounded(codes, np.ones((3, 1)), np.zeros((3, 1))).packed(bits)
    for row, words in zip(codes, packed, strict=True):
        number = sum(int(code) << (bits * i) for i, code in enumerate(row))
        assert number == sum(int(word) << (32 * i) for i, word in enumerate(words))
