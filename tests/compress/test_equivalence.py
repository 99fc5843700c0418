"""Every form of every family against numpy's own SVD and the uncompressed model."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_svd.checkpoint.loader import load_model
from mlx_svd.models.modeling_mlx_svd import _parent
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe
from mlx_svd.source.families import PROJECTIONS
from mlx_svd.source.source import open_source
from tests.conftest import logits, relative_difference, source_weights
from tests.tiny import FAMILIES, write_tiny

FORMS = ("dense", "factored", "pivot")


def recipe(form: str, ratio: float, **options) -> Recipe:
    return Recipe(PROJECTIONS, RankPolicy(rank_ratio=ratio), form=form, **options)


def effective_weights(folder, plan) -> dict[str, np.ndarray]:
    """Projection path -> the matrix that the loaded module applies, from its outputs."""
    model, _ = load_model(folder)
    linears = {p.projection.module: None for p in plan.projections}
    for path in linears:
        module = getattr(*_parent(model, path))
        n = next(p.projection.shape[1] for p in plan.projections if p.projection.module == path)
        inputs = mx.concatenate([mx.eye(n), mx.zeros((1, n))])
        outputs = np.array(module(inputs).astype(mx.float32), dtype=np.float64)
        linears[path] = mx.array((outputs[:-1] - outputs[-1]).T.astype(np.float32))
    source = open_source(str(folder.parent / "model"))
    return {
        p.path: np.array(part, dtype=np.float64)
        for linear in source.linears
        for p, part in zip(
            linear.projections, linear.split(linears[linear.path]).values(), strict=True
        )
    }


def numpy_truncation(weight: np.ndarray, ranks: tuple[int, ...]) -> np.ndarray:
    """numpy's best approximation, one rank for the matrix or one for each block of rows."""
    blocks = []
    for block, rank in zip(np.split(weight, len(ranks)), ranks, strict=True):
        u, s, v = np.linalg.svd(block, full_matrices=False)
        blocks.append((u[:, :rank] * s[:rank]) @ v[:rank])
    return np.concatenate(blocks)


@pytest.mark.parametrize("per_head", [False, True], ids=["matrix", "per head"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_gives_the_uncompressed_logits(family, form, per_head, tmp_path, compressed):
    model = write_tiny(family, tmp_path / "model")
    folder, _ = compressed(model, recipe(form, 1.0, per_head=per_head))
    assert relative_difference(logits(folder), logits(model)) <= 1e-4


@pytest.mark.parametrize("per_head", [False, True], ids=["matrix", "per head"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_truncated_form_is_numpys_rank_r_matrix(family, form, per_head, tmp_path, compressed):
    model = write_tiny(family, tmp_path / "model")
    folder, plan = compressed(model, recipe(form, 0.6, per_head=per_head))
    original, stored = source_weights(model), effective_weights(folder, plan)
    for p in plan.projections:
        assert p.form == form
        assert p.ranks is not None
        assert (len(p.ranks) > 1) == (per_head and p.projection.heads > 0)
        optimum = numpy_truncation(original[p.path], p.ranks)
        best = np.linalg.norm(original[p.path] - optimum)
        assert np.linalg.norm(original[p.path] - stored[p.path]) / best - 1 <= 1e-5, p.path
        assert np.linalg.norm(stored[p.path] - optimum) / np.linalg.norm(optimum) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_pivot_and_factored_give_the_logits_of_the_truncated_dense_matrix(
    family, tmp_path, compressed
):
    model = write_tiny(family, tmp_path / "model")
    dense, factored, pivot = (logits(compressed(model, recipe(f, 0.5))[0]) for f in FORMS)
    assert relative_difference(factored, dense) <= 1e-4
    assert relative_difference(pivot, factored) <= 1e-4
    assert relative_difference(dense, logits(model)) > 1e-3


def test_heads_of_different_ranks_are_executed(tmp_path, compressed):
    model = write_tiny("llama", tmp_path / "model")
    policy = RankPolicy(energy=0.8)
    folder, plan = compressed(model, Recipe(("q",), policy, form="factored", per_head=True))
    assert any(len(set(p.ranks)) > 1 for p in plan.projections if p.changed)
    original, stored = source_weights(model), effective_weights(folder, plan)
    for p in (p for p in plan.projections if p.changed):
        optimum = numpy_truncation(original[p.path], p.ranks)
        assert np.abs(stored[p.path] - optimum).max() <= 1e-5


@pytest.mark.parametrize("form", ["factored", "pivot"])
def test_biases_are_kept_outside_the_low_rank_map(form, tmp_path, compressed):
    model = write_tiny("qwen2", tmp_path / "model")
    folder, _ = compressed(model, recipe(form, 0.3))
    original, _ = load_model(model)
    changed, _ = load_model(folder)
    zeros = mx.zeros((1, 64))
    for before, after in zip(original.layers, changed.layers, strict=True):
        expected = before.self_attn.q_proj.bias
        assert mx.abs(after.self_attn.q_proj(zeros)[0] - expected).max() <= 1e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", ["factored", "pivot"])
def test_half_precision_factors_stay_close_to_the_optimum(form, dtype, tmp_path, compressed):
    model = write_tiny("llama", tmp_path / "model")
    folder, plan = compressed(model, recipe(form, 0.5, dtype=dtype))
    original, stored = source_weights(model), effective_weights(folder, plan)
    rounding = 4 * float(mx.finfo(getattr(mx, dtype)).eps)
    for p in plan.projections:
        optimum = numpy_truncation(original[p.path], p.ranks)
        assert np.linalg.norm(stored[p.path] - optimum) / np.linalg.norm(optimum) <= rounding


def test_replaced_modules_are_containers_of_real_linears(tmp_path, compressed):
    model = write_tiny("llama", tmp_path / "model")
    for form in ("factored", "pivot"):
        loaded, _ = load_model(compressed(model, recipe(form, 0.5))[0])
        layer = loaded.layers[0].self_attn.q_proj
        assert isinstance(layer.down, nn.Linear)
        assert isinstance(layer.up, nn.Linear)
        for name in ("weight", "to_quantized", "to_lora", "fuse"):
            assert not hasattr(layer, name)
