"""Rules: anchored globs, order, reachability, and the YAML files that hold them."""

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe, Rule, parse_projections
from mlx_svd.plan.recipe_file import load_recipe_fields
from mlx_svd.source.families import Projection
from mlx_svd.source.source import open_source
from tests.tiny import write_tiny


def projection(path: str, layer: int = 0) -> Projection:
    return Projection(path, path, "q", layer, (64, 64), 4, False)


@pytest.mark.parametrize(
    ("glob", "path", "matches"),
    [
        ("model.h.2.**", "model.h.2.attn.c_proj", True),
        ("model.h.2.**", "model.h.23.attn.c_proj", False),
        ("**.h.2.**", "model.h.23.attn.c_proj", False),
        ("**.h.2*.**", "model.h.23.attn.c_proj", True),
        ("h.2.**", "model.h.2.attn.c_proj", False),
        ("**.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("**.q_proj", "model.layers.0.self_attn.q_proj.up", False),
        ("model.layers.*.self_attn.q_proj", "model.layers.11.self_attn.q_proj", True),
        ("model.layers.?.self_attn.q_proj", "model.layers.11.self_attn.q_proj", False),
        ("**", "model.layers.0.mlp.up_proj", True),
        ("model.*", "model.layers.0.self_attn.q_proj", False),
        ("**.c_attn.k", "model.h.0.attn.c_attn.k", True),
        ("model.layersX0.**", "model.layers.0.self_attn", False),
    ],
)
def test_globs_are_anchored_and_compare_whole_names(glob, path, matches):
    assert Rule(match=(glob,)).matches(projection(path), 24) is matches


@pytest.mark.parametrize(
    ("layers", "layer", "matches"), [((0, -1), 0, True), ((0, -1), 23, True), ((0, -1), 22, False),
                                     ((24,), 0, False), ((-25,), 23, False)],
)  # fmt: skip
def test_negative_layers_count_from_the_end_and_never_wrap(layers, layer, matches):
    assert Rule(layers=layers).matches(projection("x", layer), 24) is matches


def test_first_rule_that_matches_wins(tmp_path):
    source = open_source(str(write_tiny("llama", tmp_path / "model")))
    rules = (
        Rule(match=("**.layers.0.**",), policy=RankPolicy(rank=8)),
        Rule(projections=("k",), skip=True),
        Rule(policy=RankPolicy(rank=16)),
    )
    plan = make_plan(source, Recipe(rules=rules, form="factored"))
    ranks = {p.path.removeprefix("model.layers."): p.ranks for p in plan.projections}
    assert ranks["0.self_attn.k_proj"] == (8,)
    assert ranks["1.self_attn.k_proj"] is None
    assert ranks["1.self_attn.q_proj"] == (16,)
    assert ranks["1.self_attn.v_proj"] is None


def test_rule_inherits_what_it_does_not_say(tmp_path):
    source = open_source(str(write_tiny("llama", tmp_path / "model")))
    rules = (Rule(projections=("q",), form="pivot"),)
    plan = make_plan(source, Recipe(policy=RankPolicy(rank=16), rules=rules, form="factored"))
    chosen = {p.projection.name: (p.form, p.ranks) for p in plan.projections if p.changed}
    assert chosen == {"q": ("pivot", (16,)), "k": ("factored", (16,)), "o": ("factored", (16,))}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule(match=("**.h.0.**",), skip=True)], "rule 1.*matches no q/k/o projection"),
        ([Rule(layers=(2,), skip=True)], "rule 1.*layers 2.*matches no"),
        ([Rule(projections=("v",), skip=True)], "rule 1.*matches no"),
        ([Rule(min_dim=4096, skip=True)], "rule 1.*min_dim 4096"),
        ([Rule(min_dim=16, policy=RankPolicy(rank=8)), Rule(layers=(0,), skip=True)],
         "rule 2.*never applies: rule 1"),
    ],
)  # fmt: skip
def test_rule_that_can_never_apply_is_an_error(rules, message, tmp_path):
    source = open_source(str(write_tiny("llama", tmp_path / "model")))
    with pytest.raises(MlxSvdError, match=message):
        make_plan(source, Recipe(policy=RankPolicy(rank=8), rules=tuple(rules)))


def test_projection_groups_and_order():
    assert parse_projections("o,q,k") == ("q", "k", "o")
    assert parse_projections("attention") == ("q", "k", "v", "o")
    assert parse_projections("mlp,q") == ("q", "gate", "up", "down")
    assert len(parse_projections(["all"])) == 7
    with pytest.raises(MlxSvdError, match="projection 'x'"):
        parse_projections("q,x")


RECIPE = """
projections: [q, k]
energy: [0.9, 0.95]
min_rank_ratio: 0.1
rules:
  - match: "**.layers.0.**"
    skip: true
  - layers: -1
    rank: 4
    form: factored
    bits: 8
quantize: {bits: 6, group_size: 32}
"""


def test_yaml_says_everything_that_a_recipe_can(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    recipe = Recipe(**load_recipe_fields(file))
    assert recipe.projections == ("q", "k")
    assert recipe.policy == RankPolicy(energy=(0.9, 0.95), min_rank_ratio=0.1)
    assert recipe.rules[0] == Rule(match=("**.layers.0.**",), skip=True)
    last = Rule(layers=(-1,), policy=RankPolicy(rank=4), form="factored", bits=8)
    assert recipe.rules[1] == last
    assert (recipe.quantize.bits, recipe.quantize.group_size) == (6, 32)
    assert recipe.quantization_for(last).bits == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "a recipe is a mapping"),
        ("rank_ratio: [", "not valid YAML"),
        ("rankratio: 0.5", "unknown key 'rankratio'"),
        ("rank_ratio: high", "rank_ratio: 'high' is not a number"),
        ("rank: 4\nenergy: 0.9", "exactly one"),
        ("rules: [{match: a, rank: 0}]", "rule 1: rank 0"),
        ("rules: [{rank: 4}, {skip: true, rank: 4}]", "rule 2: skip truncates nothing"),
        ("rules: [{layers: [a], skip: true}]", "rule 1: layers"),
        ("rules: [{skip: yes please}]", "rule 1: skip"),
        ("rules: [3]", "rule 1: a rule is a mapping"),
        ("rank: 4\nquantize: {bit: 4}", "quantize has an unknown key 'bit'"),
        ("rank: 4\nquantize: {bits: 7}", "--q-bits 7"),
    ],
)
def test_mistakes_in_a_file_are_named(text, message, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(MlxSvdError, match=message) as error:
        load_recipe_fields(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
