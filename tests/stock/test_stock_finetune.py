"""mlx_lm lora trains a low-rank checkpoint, generate runs the adapter, and fuse merges it."""

import re

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import mlx_svd

pytestmark = pytest.mark.stock

# The keys that people give for dense models name a container here, and mlx-lm trains Linear
# layers only; with the default keys it finds them by itself, otherwise `q_proj.up` names one.
STOCK_LIMITS = {"lora keys: [self_attn.q_proj]": "Can't convert layer of type Factored to LoRA"}
ITERATIONS = 5


@pytest.fixture(scope="module")
def train(checkpoint, run_stock, data_folder, tmp_path_factory):
    """name of a checkpoint, kind of fine-tuning -> (adapter folder, validation losses)."""
    folder, done = tmp_path_factory.mktemp("adapters"), {}

    def run(name, kind="lora"):
        if (name, kind) not in done:
            out = folder / f"{name}-{kind}"
            flags = ["--model", checkpoint(name), "--data", data_folder, "--adapter-path", out]
            flags += ["--fine-tune-type", kind, "--num-layers", -1, "--iters", ITERATIONS]
            flags += ["--batch-size", 2, "--max-seq-length", 48, "--learning-rate", 1e-4]
            flags += ["--val-batches", 1, "--steps-per-eval", ITERATIONS]
            printed = run_stock("lora", "--train", "--trust-remote-code", *flags).stdout
            losses = [float(loss) for loss in re.findall(r"\bval\s+([\d.]+|nan)", printed)]
            assert len(losses) == 2, printed
            done[name, kind] = out, losses
        return done[name, kind]

    return run


def with_adapter(path, adapter):
    return mlx_lm.load(str(path), adapter_path=str(adapter), trust_remote_code=True)


@pytest.mark.parametrize("name", ["factored", "pivot", "8bit_factored", "per_head", "corrected"])
def test_lora_with_default_keys_trains_the_factors(name, train):
    adapter, losses = train(name)
    assert losses[1] < losses[0] - 0.1
    weights = mx.load(str(adapter / "adapters.safetensors"))
    q = "model.layers.0.self_attn.q_proj" + (".heads.3" if name == "per_head" else "")
    for part in ("down", "up"):
        assert np.abs(weights[f"{q}.{part}.lora_b"]).max() > 0
    assert not any("order" in key for key in weights)


@pytest.mark.parametrize("name", ["factored", "pivot"])
def test_generate_with_an_adapter_equals_the_model_with_the_adapter(
    name, train, checkpoint, stock_text, prompt, max_tokens, greedy
):
    adapter, _ = train(name)
    text = stock_text(checkpoint(name), "--adapter-path", adapter)
    model, tokenizer = with_adapter(checkpoint(name), adapter)
    tokens = tokenizer.encode(prompt)
    assert text == mlx_lm.generate(model, tokenizer, tokens, max_tokens=max_tokens)


@pytest.mark.parametrize("name", ["factored", "pivot", "per_head"])
def test_a_fused_checkpoint_has_the_logits_of_the_adapter(
    name, train, checkpoint, run_stock, tmp_path, logits, assert_equal_logits, stock_text, greedy
):
    adapter, _ = train(name)
    out, trusted = tmp_path / "fused", ["--trust-remote-code"]
    paths = ["--adapter-path", adapter, "--save-path", out]
    run_stock("fuse", "--model", checkpoint(name), *trusted, *paths)
    adapted, _ = with_adapter(checkpoint(name), adapter)
    fused, _ = mlx_lm.load(str(out), trust_remote_code=True)
    ours, _ = mlx_svd.load(out)
    assert_equal_logits(logits(fused), logits(adapted), 1e-4)
    assert_equal_logits(logits(ours), logits(fused), 1e-6)
    assert stock_text(out) == greedy(out)


@pytest.mark.parametrize("name", ["8bit_factored", "corrected"])
def test_fusing_into_a_quantized_checkpoint_dequantizes_on_request(
    name, train, checkpoint, run_stock, tmp_path, logits, assert_equal_logits
):
    path, out = checkpoint(name), tmp_path / "fused"
    adapter, _ = train(name)
    paths = ["--adapter-path", adapter, "--save-path", out]
    run_stock("fuse", "--model", path, "--trust-remote-code", *paths, "--dequantize")
    adapted, _ = with_adapter(path, adapter)
    fused, _ = mlx_lm.load(str(out), trust_remote_code=True)
    assert_equal_logits(logits(fused), logits(adapted), 1e-3)


@pytest.mark.parametrize("name", ["pivot", "factored"])
def test_full_fine_tuning_trains_all_but_the_order_of_pivot_rows(name, train, checkpoint, logits):
    adapter, losses = train(name, "full")
    assert losses[1] < losses[0] - 0.1
    weights = mx.load(str(adapter / "adapters.safetensors"))
    assert "model.layers.0.self_attn.q_proj.down.weight" in weights
    assert not any(key.endswith(".order") for key in weights)
    model, _ = with_adapter(checkpoint(name), adapter)
    original, _ = mlx_svd.load(checkpoint(name))
    assert np.isfinite(logits(model)).all()
    assert np.abs(logits(model) - logits(original)).max() > 0.1


def test_lora_keys_that_name_a_projection_are_refused_by_mlx_lm(
    checkpoint, run_stock, data_folder, tmp_path
):
    config = tmp_path / "lora.yaml"
    settings = "lora_parameters: {rank: 8, dropout: 0.0, scale: 20.0, keys: [self_attn.q_proj]}\n"
    config.write_text(settings)
    flags = ["--data", data_folder, "--adapter-path", tmp_path / "adapter", "--num-layers", -1]
    flags += ["--config", config, "--iters", 1, "--trust-remote-code"]
    done = run_stock("lora", "--train", "--model", checkpoint("factored"), *flags, check=False)
    assert done.returncode != 0
    assert "Can't convert layer of type Factored to LoRA" in done.stderr
