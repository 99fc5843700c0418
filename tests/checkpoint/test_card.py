"""The README.md of a checkpoint."""

import pytest
from huggingface_hub import ModelCard

from mlx_svd.checkpoint.adapter import export_adapter
from mlx_svd.checkpoint.layout import quantization
from mlx_svd.errors import MlxSvdError
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe, Rule
from tests.tiny import write_tiny


def card(compressed, model, recipe) -> ModelCard:
    folder, _ = compressed(model, recipe, command="mlx-svd compress --model x")
    return ModelCard.load(folder / "README.md")


def test_front_matter_is_what_the_hub_reads_and_the_licence_is_inherited(tmp_path, compressed):
    model = write_tiny("llama", tmp_path / "model")
    (model / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n")
    made = card(compressed, model, Recipe(policy=RankPolicy(rank=8), form="factored"))
    assert made.data.license == "apache-2.0"
    assert made.data.library_name == "mlx"
    assert "mlx-svd" in made.data.tags
    assert "mlx-svd compress --model x" in made.text


def test_card_names_the_trust_flag_only_where_it_is_needed(tmp_path, compressed):
    model = write_tiny("llama", tmp_path / "model")
    policy = RankPolicy(rank=8)
    assert "--trust-remote-code" in card(compressed, model, Recipe(policy=policy)).text
    dense = card(compressed, model, Recipe(policy=policy, form="dense"))
    assert "--trust-remote-code" not in dense.text


def test_card_says_which_stock_quantization_would_skip_factors(tmp_path, compressed):
    model = write_tiny("llama", tmp_path / "model")
    text = card(compressed, model, Recipe(("q",), RankPolicy(rank=32), form="factored")).text
    assert "of 2, 2 with --q-group-size 64, 2 with --q-group-size 128" in text
    assert "--q-group-size 32" not in text
    recipe = Recipe(("q",), RankPolicy(rank=32), form="factored", quantize=quantization(8, 32))
    assert "would leave" not in card(compressed, model, recipe).text


def test_card_of_a_corrected_checkpoint_says_what_is_stored_and_how_to_export_it(
    tmp_path, compressed
):
    model = write_tiny("llama", tmp_path / "model", num_attention_heads=4, num_key_value_heads=4)
    rules = (
        Rule(layers=(0,), projections=("q",), ranks=(64,)),
        Rule(layers=(0,), policy=RankPolicy(rank=32), bits=3),
        Rule(skip=True),
    )
    recipe = Recipe(rules=rules, form="corrected", quantize=quantization(4, 32))
    text = card(compressed, model, recipe).text
    assert "truncated projections: 0 of 14; stored none\n" in text
    assert (
        "corrected projections: 3 of 14, each in 3, 4 bits plus the part of rank 32 to 64 of what "
        "these lose, as factors unquantized ("
    ) in text
    assert "mlx-svd export-adapter --model PATH" in text
    assert "mlx_lm convert" not in text


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        ("llama", Rule(layers=(0,), policy=RankPolicy(rank=32), factor_bits=8)),
        ("llama", Rule(layers=(0,), policy=RankPolicy(rank=32), form="factored")),
        ("gpt2", Rule(projections=("q",), policy=RankPolicy(rank=32), bits=3)),
        ("gpt_neo", Rule(layers=(0,), policy=RankPolicy(rank=32))),
    ],
    ids=["8-bit factors", "factored too", "parts with other bits", "not in mlx-lm"],
)
def test_card_does_not_promise_an_adapter_that_cannot_be_exported(
    family, rule, tmp_path, compressed
):
    model = write_tiny(family, tmp_path / "model")
    rules = (rule, Rule(policy=RankPolicy(rank=32)))
    recipe = Recipe(rules=rules, form="corrected", quantize=quantization(4, 32))
    folder, _ = compressed(model, recipe)
    assert "export-adapter" not in (folder / "README.md").read_text()
    with pytest.raises(MlxSvdError):
        export_adapter(folder, tmp_path / "export")
