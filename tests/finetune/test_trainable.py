"""What is trained, and what never is."""

import re

import pytest
from mlx.utils import tree_flatten

from mlx_svd.checkpoint.layout import quantization
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.errors import MlxSvdError
from mlx_svd.finetune.trainable import trainable
from mlx_svd.plan.recipe import Recipe, Rule
from mlx_svd.source.families import PROJECTIONS
from tests.finetune.conftest import HALF
from tests.tiny import FAMILIES, write_tiny

EMBEDDINGS = re.compile(r"(embed|wte|wpe|lm_head)")


def chosen(folder, train):
    model, config = load_model(folder)
    names = trainable(model, config.get("mlx_svd"), train, "x")
    return names, dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize("form", ["factored", "pivot", "corrected"])
@pytest.mark.parametrize("family", FAMILIES)
def test_factors_are_both_parts_of_every_replaced_projection(family, form, tmp_path, compressed):
    model = write_tiny(family, tmp_path / "model")
    quantize = quantization(4, 32) if form == "corrected" else None
    folder, plan = compressed(model, Recipe(PROJECTIONS, HALF, form=form, quantize=quantize))
    names, _ = chosen(folder, "factors")
    expected = {
        f"{p.path}.{part}.weight"
        for p in plan.projections
        if p.form == form
        for part in ("down", "up")
    }
    assert expected
    assert set(names) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_all_without_quantization_is_factors_and_everything_one_dimensional(
    family, tmp_path, compressed
):
    folder, _ = compressed(
        write_tiny(family, tmp_path / "model"), Recipe(policy=HALF, form="pivot")
    )
    names, parameters = chosen(folder, "all")
    factors = set(chosen(folder, "factors")[0])
    norms = set(chosen(folder, "norms")[0])
    assert norms == {n for n, p in parameters.items() if p.ndim == 1 and not n.endswith(".order")}
    assert set(names) == factors | norms
    assert any(".order" in name for name in parameters)
    assert not any(EMBEDDINGS.search(name) for name in factors)


def test_dense_projections_embeddings_and_the_head_stay_frozen(tmp_path, compressed):
    model = write_tiny("llama", tmp_path / "model", tie_word_embeddings=False)
    rules = (Rule(layers=(0,), skip=True),)
    folder, _ = compressed(model, Recipe(policy=HALF, form="factored", rules=rules))
    names, parameters = chosen(folder, "all")
    frozen = {name for name in parameters if name not in names}
    expected = {"model.embed_tokens.weight", "lm_head.weight"}
    expected |= {f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkvo"}
    expected |= {f"model.layers.1.self_attn.{p}_proj.weight" for p in "v"}
    expected |= {f"model.layers.{i}.mlp.{p}_proj.weight" for i in (0, 1) for p in PROJECTIONS[4:]}
    assert frozen == expected


def test_factors_of_every_head_are_trained(tmp_path, compressed):
    model = write_tiny("qwen2", tmp_path / "model")
    folder, _ = compressed(model, Recipe(policy=HALF, form="factored", per_head=True))
    names, _ = chosen(folder, "factors")
    heads = {f"model.layers.1.self_attn.q_proj.heads.{h}.down.weight" for h in range(4)}
    assert heads <= set(names)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_are_scales_and_biases_of_every_affine_leaf(bits, tmp_path, compressed):
    model = write_tiny("llama", tmp_path / "model")
    quantize = quantization(bits, 32)
    folder, _ = compressed(model, Recipe(policy=HALF, form="factored", quantize=quantize))
    names, parameters = chosen(folder, "scales")
    leaves = {name.rpartition(".")[0] for name in parameters if name.endswith(".scales")}
    assert "model.embed_tokens" in leaves
    assert set(names) == {f"{leaf}.{kind}" for leaf in leaves for kind in ("scales", "biases")}
    assert set(chosen(folder, "all")[0]) == set(names) | set(chosen(folder, "norms")[0])


def test_integer_scales_of_the_mx_modes_are_not_trained(tmp_path, compressed):
    model = write_tiny("llama", tmp_path / "model")
    quantize = quantization(mode="mxfp4")
    folder, _ = compressed(model, Recipe(policy=HALF, form="factored", quantize=quantize))
    names, parameters = chosen(folder, "all")
    assert any(name.endswith(".scales") for name in parameters)
    assert all(parameters[name].ndim == 1 for name in names)
    with pytest.raises(MlxSvdError, match=r"nothing to train with --train scales.*or norms"):
        chosen(folder, "scales")


def test_pivot_form_in_which_all_rows_are_pivots_is_dense_and_frozen(tmp_path, compressed):
    model = write_tiny("qwen2", tmp_path / "model")
    policy = type(HALF)(rank=32)
    folder, plan = compressed(model, Recipe(("k", "q"), policy, form="pivot"))
    full = [p.path for p in plan.projections if p.form == "pivot" and p.ranks[0] == 32 == p.limit]
    names, parameters = chosen(folder, "factors")
    dense = {f"{path}.weight" for path in full if f"{path}.weight" in parameters}
    assert not dense & set(names)
    assert "model.layers.0.self_attn.q_proj.up.weight" in names
