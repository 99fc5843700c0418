"""The per-layer table against numpy."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_svd
from mlx_svd.checkpoint.layout import quantization
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe
from tests.conftest import source_weights
from tests.tiny import write_tiny


@pytest.mark.parametrize("form", ["dense", "factored", "pivot"])
@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_energy_and_error_are_numpys(family, form, tmp_path, compressed):
    model = write_tiny(family, tmp_path / "model")
    policy = RankPolicy(rank_ratio=0.4)
    folder, plan = compressed(model, Recipe(policy=policy, form=form))
    weights = source_weights(model)
    planned = {p.path: p for p in plan.projections}
    inspection = mlx_svd.inspect(folder)
    changed = [p for p in inspection.projections if p.ranks]
    assert len(changed) == 6
    for p in changed:
        sigma = np.linalg.svd(weights[p.path], compute_uv=False)
        energy = (sigma[: p.ranks[0]] ** 2).sum() / (sigma**2).sum()
        assert p.energy == pytest.approx(energy, abs=1e-9)
        assert p.relative_error == pytest.approx(np.sqrt(1 - energy), rel=1e-4)
        assert (p.form, p.nbytes) == (form, planned[p.path].bytes_after)
        assert not p.saved_again
    assert inspection.nbytes == plan.bytes_after


def test_error_includes_quantization(tmp_path, compressed):
    model = write_tiny("llama", tmp_path / "model")
    policy = RankPolicy(rank_ratio=0.5)
    errors = []
    for quantize in (None, quantization(8, 32), quantization(3, 32)):
        recipe = Recipe(("q",), policy, form="factored", quantize=quantize)
        inspection = mlx_svd.inspect(compressed(model, recipe)[0])
        errors.append(inspection.projections[0].relative_error)
    assert errors[0] < errors[1] < errors[2]


def test_projection_saved_again_by_another_program_is_marked(tmp_path, compressed):
    model = write_tiny("llama", tmp_path / "model")
    policy = RankPolicy(rank_ratio=0.5)
    folder, _ = compressed(model, Recipe(("q",), policy, form="factored"))
    tensors = mx.load(str(folder / "model.safetensors"))
    name = "model.layers.0.self_attn.q_proj.up.weight"
    tensors[name] = tensors[name].astype(mx.float16)
    mx.eval(list(tensors.values()))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    marks = {p.path: p.saved_again for p in mlx_svd.inspect(folder).projections}
    assert marks == {
        "model.layers.0.self_attn.q_proj": True,
        "model.layers.1.self_attn.q_proj": False,
    }


def test_uncompressed_model_is_refused(tmp_path):
    with pytest.raises(MlxSvdError, match="no mlx_svd section"):
        mlx_svd.inspect(write_tiny("llama", tmp_path / "model"))
