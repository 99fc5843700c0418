"""Quantized checkpoints against mlx-lm's own converter and against the unquantized matrices."""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_svd.checkpoint.layout import quantization
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe, Rule
from mlx_svd.source.source import open_source
from tests.tiny import write_tiny

Q4 = quantization(4)


def tensors(folder) -> dict[str, mx.array]:
    loaded: dict[str, mx.array] = {}
    for file in folder.glob("model*.safetensors"):
        loaded |= mx.load(str(file))
    return loaded


@pytest.mark.parametrize(
    ("bits", "group_size", "mode"),
    [(8, 64, "affine"), (6, 32, "affine"), (5, 64, "affine"), (4, 128, "affine"),
     (3, 64, "affine"), (4, 32, "mxfp4"), (4, 16, "nvfp4"), (8, 32, "mxfp8")],
)  # fmt: skip
def test_without_truncation_it_is_bit_for_bit_what_mlx_lm_convert_writes(
    bits, group_size, mode, tmp_path, compressed
):
    stock = tmp_path / "stock"
    mlx_lm.convert(
        str(DEMO_MODEL), str(stock), quantize=True, q_bits=bits, q_group_size=group_size,
        q_mode=mode,
    )  # fmt: skip
    recipe = Recipe(rules=(Rule(skip=True),), quantize=quantization(bits, group_size, mode))
    folder, _ = compressed(DEMO_MODEL, recipe)
    ours, theirs = tensors(folder), tensors(stock)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert mx.array_equal(ours[name], tensor).item(), name
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, stock)]
    assert configs[0]["quantization"] == configs[1]["quantization"]
    assert "model_file" not in configs[0]


def test_modules_that_are_not_truncated_are_mlx_lms_in_a_truncated_checkpoint_too(
    tmp_path, compressed
):
    stock = tmp_path / "stock"
    mlx_lm.convert(str(DEMO_MODEL), str(stock), quantize=True, q_bits=4, q_group_size=64)
    policy = RankPolicy(rank_ratio=0.5)
    folder, _ = compressed(DEMO_MODEL, Recipe(policy=policy, form="factored", quantize=Q4))
    ours, theirs = tensors(folder), tensors(stock)
    same = [n for n in theirs if not any(f"{p}_proj" in n for p in "qko")]
    assert len(same) > 60
    for name in same:
        assert mx.array_equal(ours[name], theirs[name]).item(), name


def relative_errors(folder) -> dict[str, float]:
    """Projection path -> ||W_r - W'|| / ||W_r||, W_r from numpy, W' as loaded."""
    model, config = load_model(folder, dtype="float32")
    source = open_source(str(DEMO_MODEL))
    stream = source.stream()
    errors = {}
    for path, entry in config["mlx_svd"]["projections"].items():
        weight = np.array(stream.take(f"{path}.weight").astype(mx.float32), dtype=np.float64)
        module = model
        for name in path.split("."):
            module = module[int(name)] if isinstance(module, list) else getattr(module, name)
        inputs = mx.concatenate([mx.eye(weight.shape[1]), mx.zeros((1, weight.shape[1]))])
        outputs = np.array(module(inputs), dtype=np.float64)
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        rank = entry["ranks"][0]
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        error = np.linalg.norm((outputs[:-1] - outputs[-1]).T - best) / np.linalg.norm(best)
        errors[path] = error
    return errors


def test_rotated_balanced_factors_lose_less_in_4_bits_than_plain_ones(compressed):
    policy = RankPolicy(rank_ratio=0.5)
    folder, _ = compressed(DEMO_MODEL, Recipe(policy=policy, form="factored", quantize=Q4))
    errors = relative_errors(folder)
    source = open_source(str(DEMO_MODEL))
    stream = source.stream()
    for path, error in errors.items():
        weight = np.array(stream.take(f"{path}.weight").astype(mx.float32), dtype=np.float64)
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        rank = 64 if "k_proj" in path else 128
        plain = [u[:, :rank], s[:rank, None] * v[:rank]]
        read = []
        for factor in plain:
            packed = mx.quantize(mx.array(factor.astype(np.float32)), 64, 4)
            read.append(np.array(mx.dequantize(*packed, group_size=64, bits=4), dtype=np.float64))
        best = plain[0] @ plain[1]
        unrotated = np.linalg.norm(read[0] @ read[1] - best) / np.linalg.norm(best)
        assert error < unrotated, path


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.015), (6, 0.05), (4, 0.2), (3, 0.4)])
def test_quantized_factors_are_close_to_the_rank_r_matrix(bits, limit, compressed):
    policy = RankPolicy(rank_ratio=0.5)
    recipe = Recipe(policy=policy, form="factored", quantize=quantization(bits))
    assert max(relative_errors(compressed(DEMO_MODEL, recipe)[0]).values()) < limit


def test_bits_of_a_rule_leave_a_matrix_alone_that_the_group_size_does_not_divide(
    tmp_path, compressed
):
    model = write_tiny("llama", tmp_path / "model")  # the inputs of its down_proj are 96
    recipe = Recipe(("q", "down"), rules=(Rule(skip=True, bits=8),), quantize=Q4)
    folder, _ = compressed(model, recipe)
    section = json.loads((folder / "config.json").read_text())["quantization"]
    assert section["model.layers.0.self_attn.q_proj"]["bits"] == 8
    assert "model.layers.0.mlp.down_proj" not in section
    assert "model.layers.0.mlp.down_proj.scales" not in tensors(folder)
    load_model(folder)


def test_bits_of_a_rule_quantize_that_projection_only(compressed):
    rules = (Rule(projections=("q",), policy=RankPolicy(rank=64), bits=8), Rule(skip=True))
    folder, _ = compressed(DEMO_MODEL, Recipe(rules=rules, form="factored"))
    packed = {n.rpartition(".")[0] for n in tensors(folder) if n.endswith(".scales")}
    assert packed == {
        f"model.layers.{i}.self_attn.q_proj.{part}" for i in range(6) for part in ("down", "up")
    }
    load_model(folder)
