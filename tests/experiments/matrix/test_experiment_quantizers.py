"""Quantizers against plain loops and MLX's own."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.matrix.quantizers import Quantizer, quantize_model, symmetric

WEIGHT = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)


def rounded_by_loop(values: np.ndarray, bits: int) -> np.ndarray:
    """The seed's: scale = max abs / (2^(bits - 1) - 1), round, multiply back."""
    scale = max(abs(float(v)) for v in values.ravel()) / (2 ** (bits - 1) - 1)
    return np.array([round(float(v) / scale) * scale for v in values.ravel()]).reshape(values.shape)


@pytest.mark.parametrize("bits", [8, 4])
def test_symmetric_rounding_of_a_tensor_and_of_rows_is_the_seeds(bits):
    np.testing.assert_allclose(
        symmetric(WEIGHT, bits, by_row=False), rounded_by_loop(WEIGHT, bits), rtol=1e-12
    )
    rows = np.stack([rounded_by_loop(row, bits) for row in WEIGHT])
    np.testing.assert_allclose(symmetric(WEIGHT, bits, by_row=True), rows, rtol=1e-12)


def test_a_tensor_of_zeros_stays_zero():
    assert not symmetric(np.zeros((2, 4)), 8, by_row=True).any()


def test_grouped_rounding_is_what_mlx_reads_back():
    packed = mx.quantize(mx.array(WEIGHT.astype(np.float16)), 64, 4)
    expected = np.array(mx.dequantize(*packed, group_size=64, bits=4).astype(mx.float32))
    np.testing.assert_array_equal(Quantizer("group", 4).rounded(WEIGHT), expected)


def test_finer_scales_never_cost_fewer_bytes_and_err_less():
    chosen = [Quantizer("tensor", 8), Quantizer("channel", 8)]
    sizes = [q.nbytes(WEIGHT.shape) for q in chosen]
    errors = [np.abs(q.rounded(WEIGHT) - WEIGHT).mean() for q in chosen]
    assert sizes == [6 * 64 + 2, 6 * 64 + 12]
    assert errors[1] < errors[0]
    assert Quantizer("group", 4).nbytes(WEIGHT.shape) == 6 * 64 // 2 + 6 * 4


def test_what_cannot_be_is_refused():
    with pytest.raises(MlxSvdError, match="tensor, channel, group"):
        Quantizer("blocks")
    with pytest.raises(MlxSvdError, match="bits 9"):
        Quantizer("tensor", 9)
    with pytest.raises(MlxSvdError, match="group_size"):
        Quantizer("group", 8).rounded(WEIGHT[:, :50])


def test_a_model_is_quantized_whole_and_comes_back_bit_by_bit():
    model = nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 4), nn.RMSNorm(4))
    model.layers[2].weight = mx.array([0.1, 0.2, 0.3, 1.0])
    before = [np.array(layer.weight) for layer in model.layers]
    with quantize_model(model, Quantizer("tensor", 4)):
        for layer, weight in zip(model.layers, before, strict=True):
            np.testing.assert_allclose(
                np.array(layer.weight), rounded_by_loop(weight, 4), atol=1e-6
            )
    for layer, weight in zip(model.layers, before, strict=True):
        np.testing.assert_array_equal(np.array(layer.weight), weight)
