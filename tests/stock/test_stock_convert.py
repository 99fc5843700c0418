"""mlx_lm convert quantizes the factors of a low-rank checkpoint, and mlx-svd reads the result."""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import mlx_svd

pytestmark = pytest.mark.stock

CASES = [("factored", 64, 4), ("factored", 32, 4), ("pivot", 64, 8), ("8bit_auto", 64, None)]
CASES += [("corrected", 64, None), ("corrected", 64, 8)]
IDS = [f"{form}-groups_of_{group}-{bits or 'no'}_bits" for form, group, bits in CASES]
# Stock mlx-lm leaves a weight unquantized, without a word, where its columns are no multiple of
# the group size. The columns of ``up`` are the rank, so ranks should be multiples of 64.
STOCK_LIMITS = {
    "convert -q": "leaves `up` unquantized at ranks that the group size does not divide"
}


@pytest.fixture(scope="module")
def convert(checkpoint, run_stock, tmp_path_factory):
    """form, group size, bits (None: dequantize) -> the folder that mlx_lm convert wrote."""
    folder = tmp_path_factory.mktemp("converted")

    def run(form, group_size, bits):
        out = folder / f"{form}-{group_size}-{bits}"
        if not out.exists():
            flags = ["-q", "--q-bits", bits, "--q-group-size", group_size] if bits else ["-d"]
            model = ["--hf-path", checkpoint(form), "--trust-remote-code"]
            run_stock("convert", *model, "--mlx-path", out, *flags)
        return out

    return run


def weights_of(folder):
    return mx.load(str(folder / "model.safetensors"))


def dequantized(weights, group_size, bits):
    """The tensors with every packed weight written out."""
    packed = {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}
    full = {
        f"{path}.weight": mx.dequantize(
            *(weights[f"{path}.{part}"] for part in ("weight", "scales", "biases")),
            group_size=group_size,
            bits=bits,
        )
        for path in packed
    }
    parts = {f"{path}.{part}" for path in packed for part in ("weight", "scales", "biases")}
    return full | {name: tensor for name, tensor in weights.items() if name not in parts}


@pytest.mark.parametrize(("form", "group_size", "bits"), CASES, ids=IDS)
def test_a_converted_checkpoint_generates_the_same_in_mlx_lm_and_mlx_svd(
    form, group_size, bits, convert, stock_text, greedy
):
    converted = convert(form, group_size, bits)
    assert stock_text(converted) == greedy(converted)


@pytest.mark.parametrize(("form", "group_size", "bits"), CASES[:3], ids=IDS[:3])
def test_convert_quantizes_every_factor(form, group_size, bits, convert, checkpoint):
    names = set(weights_of(convert(form, group_size, bits)))
    config = json.loads((convert(form, group_size, bits) / "config.json").read_text())
    assert config["quantization"]["bits"] == bits
    assert config["quantization"]["group_size"] == group_size
    changed = [p for p, e in config["mlx_svd"]["projections"].items() if e["form"] == form]
    assert len(changed) == 18  # q, k and o of 6 layers
    for path in changed:
        assert {f"{path}.down.scales", f"{path}.up.scales"} <= names


@pytest.mark.parametrize(("form", "group_size", "bits"), CASES[:3], ids=IDS[:3])
def test_logits_are_those_of_the_dequantized_factors(
    form, group_size, bits, convert, checkpoint, logits, assert_equal_logits
):
    converted = convert(form, group_size, bits)
    stock, _ = mlx_lm.load(str(converted), trust_remote_code=True)
    reference, _ = mlx_svd.load(checkpoint(form))
    original = weights_of(checkpoint(form))
    written_out = dequantized(weights_of(converted), group_size, bits)
    for name, weight in original.items():
        error = mx.linalg.norm(written_out[name].astype(mx.float32) - weight)
        norm = float(mx.linalg.norm(weight.astype(mx.float32)))
        assert float(error) <= (0.2 if bits == 4 else 0.02) * norm, name
    reference.load_weights(list(written_out.items()))
    assert_equal_logits(logits(stock), logits(reference), 1e-4)


@pytest.mark.parametrize("name", ["8bit_auto", "corrected"])
def test_dequantizing_gives_back_the_logits_of_the_quantized_checkpoint(
    name, convert, checkpoint, logits, assert_equal_logits
):
    converted = convert(name, 64, None)
    assert not any(name.endswith(".scales") for name in weights_of(converted))
    stock, _ = mlx_lm.load(str(converted), trust_remote_code=True)
    quantized, _ = mlx_svd.load(checkpoint(name))
    assert_equal_logits(logits(stock), logits(quantized), 1e-4)


@pytest.mark.parametrize(("form", "group_size", "bits"), CASES, ids=IDS)
def test_mlx_svd_loads_and_inspects_a_converted_checkpoint(
    form, group_size, bits, convert, checkpoint, logits, assert_equal_logits
):
    converted = convert(form, group_size, bits)
    ours, _ = mlx_svd.load(converted)
    stock, _ = mlx_lm.load(str(converted), trust_remote_code=True)
    assert_equal_logits(logits(ours), logits(stock), 1e-6)
    before, after = mlx_svd.inspect(checkpoint(form)), mlx_svd.inspect(converted)
    assert not any(p.saved_again for p in before.projections)
    assert all(p.saved_again for p in after.projections)
    assert (after.nbytes < before.nbytes) == bool(bits)
    assert [(p.path, p.form, p.ranks) for p in after.projections] == [
        (p.path, p.form, p.ranks) for p in before.projections
    ]


def test_convert_skips_up_where_the_group_size_does_not_divide_the_rank(
    convert, stock_text, greedy
):
    converted = convert("per_head", 64, 4)  # 32 of 64 ranks in every head of q and k
    names = set(weights_of(converted))
    head = "model.layers.0.self_attn.q_proj.heads.0"
    assert f"{head}.down.scales" in names
    assert f"{head}.up.scales" not in names
    assert stock_text(converted) == greedy(converted)


def test_convert_quantizes_the_factors_of_a_corrected_checkpoint_and_leaves_its_base(
    convert, checkpoint, logits, assert_equal_logits
):
    converted = convert("corrected", 64, 8)
    weights, original = weights_of(converted), weights_of(checkpoint("corrected"))
    factors = {n.removesuffix(".weight") for n in original if n.split(".")[-2] in ("down", "up")}
    assert len(factors) == 2 * 7 * 6
    for name, tensor in original.items():
        if name.removesuffix(".weight") in factors:
            assert f"{name.removesuffix('.weight')}.scales" in weights
        else:
            assert np.array_equal(weights[name], tensor), name
    section = json.loads((converted / "config.json").read_text())["quantization"]
    assert {path for path in section if path.startswith("model.")} == factors
    before, after = mlx_svd.load(checkpoint("corrected"))[0], mlx_svd.load(converted)[0]
    assert_equal_logits(logits(after), logits(before), 2e-2)


def test_convert_casts_to_half_precision_and_keeps_the_order_of_pivot_rows(
    checkpoint, run_stock, tmp_path
):
    out, trusted = tmp_path / "half", ["--trust-remote-code"]
    model = ["--hf-path", checkpoint("pivot"), *trusted]
    run_stock("convert", *model, "--mlx-path", out, "--dtype", "bfloat16")
    weights, original = weights_of(out), weights_of(checkpoint("pivot"))
    assert set(weights) == set(original)
    for name, tensor in weights.items():
        order = name.endswith(".order")
        assert tensor.dtype == (mx.uint32 if order else mx.bfloat16)
        if order:
            assert np.array_equal(tensor, original[name])
    model, _ = mlx_lm.load(str(out), trust_remote_code=True)
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()
