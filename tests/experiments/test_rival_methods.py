"""Which quantizers of mlx-lm run on which architectures, and what makes them run on a CPU."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_svd.checkpoint.loader import load_model
from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.rival_methods import in_float32, quantize_rival
from mlx_svd.experiments.rival_runner import as_stored, multiply_written_out
from mlx_svd.experiments.rival_spec import rival_spec

FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
]
NAMES = ["q4", "mixed_2_6", "dynamic_quant@4.5", "gptq4", "awq4", "dwq3"]
# (rival, architecture) -> mlx-lm's reason.
NOT_RUNNING = {
    ("mixed_2_6", "gpt2"): "Model does not have expected keys for mixed quant",
    ("mixed_2_6", "gpt_neox"): "Model does not have expected keys for mixed quant",
    ("awq4", "gemma2"): "awq has no rules for model type gemma2",
    ("awq4", "phi3"): "awq has no rules for model type phi3",
    ("awq4", "gpt2"): "awq has no rules for model type gpt2",
    ("awq4", "gpt_neox"): "awq has no rules for model type gpt_neox",
}


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    monkeypatch.setattr(mx, "quantized_matmul", mx.quantized_matmul)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_mlx_lm_quantizes_the_architectures_that_are_not_listed(name, family, tiny, windows):
    if mx.default_device() == mx.Device(mx.cpu):
        multiply_written_out()
    model, config = load_model(tiny(family), lazy=True)
    spec = rival_spec(name, batch_size=1)
    if (name, family) in NOT_RUNNING:
        with pytest.raises((ValueError, MlxSvdError), match=NOT_RUNNING[name, family]):
            quantize_rival(spec, model, config, windows, 0)
        return
    quantized, config, _ = quantize_rival(spec, model, config, windows, 0)
    assert "quantization" in config
    logits = quantized(mx.array(windows[:1]))
    assert mx.isfinite(logits).all().item()
    layers = [m for _, m in tree_flatten(quantized.leaf_modules(), is_leaf=nn.Module.is_module)]
    assert not any(type(m) is nn.Linear for m in layers)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_multiplying_written_out_is_the_product_of_mlx_with_its_gradients(bits):
    rng = mx.random.key(0)
    x, w = mx.random.normal((7, 128), key=rng), mx.random.normal((96, 128), key=rng)
    packed, scales, biases = mx.quantize(w, group_size=64, bits=bits)

    def loss(product):
        def value(x, scales, biases):
            y = product(
                x, packed, scales=scales, biases=biases, transpose=True, group_size=64, bits=bits
            )
            return (y * mx.cos(y)).sum()

        return mx.value_and_grad(value, argnums=(0, 1, 2))

    value, gradients = loss(mx.quantized_matmul)(x, scales, biases)
    multiply_written_out()
    found, found_gradients = loss(mx.quantized_matmul)(x, scales, biases)
    assert found.item() == pytest.approx(value.item(), rel=1e-4)
    for a, b in zip(found_gradients, gradients, strict=True):
        assert mx.abs(a - b).max().item() <= 1e-4 * mx.abs(b).max().item()


def test_scales_are_stored_in_the_dtype_of_the_weight_they_replace(tiny):
    model, _ = load_model(tiny(), lazy=True)
    dtypes = {name: p.dtype for name, p in tree_flatten(model.parameters())}
    dtypes["model.norm.weight"] = mx.float16  # some exports keep norms in another dtype
    changed = in_float32(model)
    nn.quantize(changed, group_size=64, bits=4)
    as_stored(changed, dtypes)
    found = {name: p.dtype for name, p in tree_flatten(changed.parameters())}
    layer = "model.layers.0.mlp.up_proj"
    assert found[f"{layer}.weight"] == mx.uint32
    assert found[f"{layer}.scales"] == found[f"{layer}.biases"] == mx.bfloat16
    assert found["model.norm.weight"] == mx.float16
    assert set(found.values()) == {mx.uint32, mx.bfloat16, mx.float16}


def test_a_tensor_that_is_not_finite_is_named(tiny):
    model, _ = load_model(tiny())
    dtypes = {name: p.dtype for name, p in tree_flatten(model.parameters())}
    model.model.norm.weight = mx.full((64,), np.inf)
    with pytest.raises(MlxSvdError, match=r"model\.norm\.weight: is NaN or infinite"):
        as_stored(model, dtypes)


def test_dwq_refuses_too_few_windows(tiny, windows):
    model, config = load_model(tiny(), lazy=True)
    with pytest.raises(MlxSvdError, match="8 windows are too few for batches of 5"):
        quantize_rival(rival_spec("dwq3", batch_size=5), model, config, windows, 0)
