"""Plans: forms, rounding, reasons, and bytes that equal those on disk."""

import json

import mlx.core as mx
import pytest

from mlx_svd.checkpoint.layout import quantization
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.compress import compress
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe, Rule
from mlx_svd.plan.recipe_file import load_recipe_fields
from mlx_svd.source.families import PROJECTIONS
from mlx_svd.source.source import open_source
from tests.tiny import FAMILIES, write_tiny


def plan_for(tmp_path, recipe: Recipe, family: str = "llama", **model):
    return make_plan(open_source(str(write_tiny(family, tmp_path / "model", **model))), recipe)


def by_name(plan) -> dict:
    return {p.projection.name: p for p in plan.projections if p.projection.layer == 0}


def test_factored_is_smaller_only_below_the_break_even_rank(tmp_path):
    plan = by_name(plan_for(tmp_path, Recipe(PROJECTIONS, RankPolicy(rank=8), form="factored")))
    for p in plan.values():
        m, n = p.projection.shape
        assert p.break_even == (m * n - 1) // (m + n)


def test_auto_takes_the_smallest_form_and_never_grows(tmp_path):
    recipe = Recipe(PROJECTIONS, RankPolicy(rank_ratio=0.8))
    for p in plan_for(tmp_path, recipe).projections:
        assert p.form == "pivot"  # fewer numbers than dense at every rank below full
        assert p.bytes_after < p.bytes_dense


def test_auto_never_quantizes_a_pivot_form_and_keeps_dense_above_break_even(tmp_path):
    recipe = Recipe(
        ("q", "k"), RankPolicy(rank_ratio=0.5), quantize=quantization(8, 32), dtype="float16"
    )
    plan = by_name(plan_for(tmp_path, recipe))
    assert plan["k"].form == "dense"  # 32 x 64 at rank 16 -> 32 is full
    assert plan["q"].form == "dense"  # 64 x 64 at rank 32 is just break-even
    assert "of it" in plan["q"].reason
    assert plan["q"].ranks == (32,)


def test_explicit_form_is_obeyed_even_when_larger_and_the_plan_says_so(tmp_path):
    plan = plan_for(tmp_path, Recipe(("q",), RankPolicy(rank_ratio=0.7), form="factored"))
    q = by_name(plan)["q"]
    assert (q.form, q.ranks) == ("factored", (44,))
    assert q.bytes_after > q.bytes_dense
    assert "% of dense" in q.reason
    assert any("larger than stored dense" in note for note in plan.notes)


def test_rounding_to_the_group_size_is_said(tmp_path):
    recipe = Recipe(
        ("q",), RankPolicy(rank_ratio=0.4), form="factored", quantize=quantization(4, 32)
    )
    q = by_name(plan_for(tmp_path, recipe, hidden_size=128, head_dim=32))["q"]
    assert (q.form, q.ranks) == ("factored", (64,))
    assert q.reason.startswith("rank 51 rounded to a multiple of 32")


def test_matrix_smaller_than_a_group_stays_dense_with_the_reason(tmp_path):
    recipe = Recipe(("k",), RankPolicy(rank_ratio=0.4), form="factored", quantize=quantization(4))
    k = by_name(plan_for(tmp_path, recipe))["k"]
    assert (k.form, k.ranks) == ("dense", None)
    assert "below a rank of 64" in k.reason


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(("k",), RankPolicy(rank=33)), "k_proj: rank 33 is over min.m, n. = 32"),
        (Recipe(("q",), RankPolicy(rank=8), form="pivot", quantize=quantization(4, 32)),
         "q_proj: the pivot form cannot be stored in 4 bits"),
        (Recipe(("q",), RankPolicy(rank=8), rank_multiple=48, quantize=quantization(4, 32)),
         "rank-multiple 48"),
        (Recipe(("q",), rules=(Rule(ranks=(8, 8, 8)),)), "ranks .8, 8, 8. do not fit"),
    ],
)  # fmt: skip
def test_impossible_wishes_name_the_projection(recipe, message, tmp_path):
    with pytest.raises(MlxSvdError, match=message):
        plan_for(tmp_path, recipe)


def test_gate_does_not_exist_in_gpt2(tmp_path):
    with pytest.raises(MlxSvdError, match="gpt2 model has no gate"):
        plan_for(tmp_path, Recipe(("gate",), RankPolicy(rank=8)), "gpt2")


def test_energy_policy_keeps_at_least_what_was_asked(tmp_path, compressed):
    model = write_tiny("qwen2", tmp_path / "model")
    folder, plan = compressed(model, Recipe(policy=RankPolicy(energy=0.9)))
    section = json.loads((folder / "config.json").read_text())["mlx_svd"]["projections"]
    assert all(0.9 <= entry["energy"] <= 1 for entry in section.values())
    assert any(p.changed for p in plan.projections)


UNQUANTIZED, EIGHT, FOUR = None, quantization(8, 32), quantization(4, 32)
MODES = {
    "3 bits": quantization(3, 32),
    "5 bits": quantization(5, 64),
    "mxfp4": quantization(mode="mxfp4"),
    "nvfp4": quantization(mode="nvfp4"),
    "mxfp8": quantization(mode="mxfp8"),
}


def bytes_on_disk(folder) -> int:
    """Data bytes of all safetensors files, from their length fields alone."""
    data = 0
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        data += len(raw) - 8 - int.from_bytes(raw[:8], "little")
    return data


def check_bytes(model, recipe: Recipe, folder) -> None:
    source = open_source(str(model))
    plan = make_plan(source, recipe)
    compress(source, plan, folder)
    load_model(folder)  # strict: names and shapes are the model's
    assert bytes_on_disk(folder) == plan.bytes_after
    saved = json.loads((folder / "mlx_svd_plan.json").read_text())
    assert saved == json.loads(json.dumps(plan.to_json()))


@pytest.mark.parametrize("quantize", [UNQUANTIZED, EIGHT, FOUR], ids=["16", "8", "4"])
@pytest.mark.parametrize("form", ["auto", "dense", "factored", "pivot"])
@pytest.mark.parametrize("family", FAMILIES)
def test_planned_bytes_are_the_bytes_on_disk(family, form, quantize, tmp_path):
    if form == "pivot" and quantize == FOUR:
        quantize = UNQUANTIZED  # refused in 4 bits: both halves of a mixed recipe are tested below
    model = write_tiny(family, tmp_path / "model", shards=2, dtype=mx.bfloat16)
    recipe = Recipe(PROJECTIONS, RankPolicy(rank_ratio=0.5), form=form, quantize=quantize)
    check_bytes(model, recipe, tmp_path / "out")


@pytest.mark.parametrize("quantize", MODES.values(), ids=MODES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_planned_bytes_are_right_in_every_mode_of_quantization(family, quantize, tmp_path):
    model = write_tiny(family, tmp_path / "model")
    policy = RankPolicy(rank_ratio=0.5)
    recipe = Recipe(PROJECTIONS, policy, form="factored", quantize=quantize)
    check_bytes(model, recipe, tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_planned_bytes_are_right_with_different_bits_in_one_module(family, tmp_path):
    rules = (
        Rule(projections=("q",), form="factored", bits=4),
        Rule(projections=("k",), form="pivot", bits=16),
        Rule(projections=("v",), skip=True, bits=5),
        Rule(projections=("o",), form="pivot", bits=8, per_head=True),
    )
    policy = RankPolicy(rank_ratio=0.5)
    recipe = Recipe(("q", "k", "v", "o"), policy, rules=rules, quantize=quantization(8, 32))
    check_bytes(write_tiny(family, tmp_path / "model"), recipe, tmp_path / "out")


def test_parts_add_up_to_the_whole(tmp_path):
    plan = plan_for(tmp_path, Recipe(PROJECTIONS, RankPolicy(rank_ratio=0.5)))
    inside = sum(p.bytes_after for p in plan.projections)
    outside = sum(
        spec.nbytes for unit in plan.units if unit.linear_index is None for spec in unit.tensors
    )
    assert inside + outside == plan.bytes_after


@pytest.mark.parametrize("per_head", [False, True])
def test_saved_plan_repeats_the_same_plan(per_head, tmp_path):
    model = write_tiny("gpt2", tmp_path / "model")
    source = open_source(str(model))
    policy = RankPolicy(energy=0.85)
    rules = (Rule(layers=(0,), projections=("o",), skip=True), Rule(projections=("v",), bits=4))
    first = make_plan(
        source,
        Recipe(("q", "v", "o"), policy, rules=rules, per_head=per_head, dtype="bfloat16"),
    )
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(first.to_json()))
    again = make_plan(source, Recipe(**load_recipe_fields(file)))
    assert [(p.path, p.form, p.ranks, p.quantization) for p in again.projections] == [
        (p.path, p.form, p.ranks, p.quantization) for p in first.projections
    ]
    assert again.tensors == first.tensors
