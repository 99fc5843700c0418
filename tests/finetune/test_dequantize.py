"""Training with dequantized matrices is the stock layers' computation."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_svd.checkpoint.layout import MODES
from mlx_svd.finetune.dequantize import multiply_dequantized
from tests.conftest import relative_difference


class Both(nn.Module):
    """A tied embedding and a projection, as models use them."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.linear = nn.Linear(64, 64, bias=True)

    def __call__(self, tokens):
        return self.embedding.as_linear(self.linear(self.embedding(tokens)))


@pytest.fixture(params=sorted(MODES))
def model(request):
    mx.random.seed(3)
    model = Both()
    group_size, bits, _ = MODES[request.param]
    nn.quantize(model, group_size=group_size, bits=bits, mode=request.param)
    return model


def test_outputs_and_parameters_are_the_stock_layers(model):
    x, tokens = mx.random.normal((9, 64)), mx.array([3, 7, 49, 0])
    layers = (lambda: model.linear(x), lambda: model.embedding.as_linear(x))
    layers += (lambda: model.embedding(tokens),)
    expected, names = [f() for f in layers], [n for n, _ in tree_flatten(model.parameters())]
    stock = {type(model.linear), type(model.embedding)}
    multiply_dequantized(model)
    assert not stock & {type(model.linear), type(model.embedding)}
    for f, y in zip(layers, expected, strict=True):
        got = f()
        assert got.dtype == y.dtype
        assert relative_difference(*(np.array(a.astype(mx.float32)) for a in (got, y))) < 1e-5
    assert [n for n, _ in tree_flatten(model.parameters())] == names


def test_gradients_of_scales_and_biases_are_the_stock_layers():
    mx.random.seed(4)
    model = Both()
    nn.quantize(model, group_size=32, bits=3)
    tokens = mx.array([3, 7, 49, 0])

    def gradients():
        model.freeze()
        for module in (model.linear, model.embedding):
            module.unfreeze(keys=["scales", "biases"], recurse=False)
        loss = nn.value_and_grad(model, lambda: mx.square(model(tokens)).sum())
        return dict(tree_flatten(loss()[1]))

    expected = gradients()
    multiply_dequantized(model)
    got = gradients()
    assert set(got) == set(expected)
    assert len(got) == 4
    for name, gradient in got.items():
        assert relative_difference(np.array(gradient), np.array(expected[name])) < 1e-4
