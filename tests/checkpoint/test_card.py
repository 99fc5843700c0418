"""The README.md of a checkpoint."""

from huggingface_hub import ModelCard

from mlx_svd.checkpoint.layout import quantization
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe
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
