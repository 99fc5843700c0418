"""The recipes in configs/recipes, on tiny models of the architectures that they are for."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_svd.checkpoint.layout import quantization
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.compress import compress
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.recipe import Recipe, Rule
from mlx_svd.plan.recipe_file import load_recipe_fields
from mlx_svd.source.families import PROJECTIONS
from tests.calibrate.material import calibrated, tiny_model

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "recipes"
FAMILIES = {"qwen2.5": "qwen2", "llama": "llama"}
# Rows must hold whole groups of 64.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 2}


def tensor_bytes(folder: Path) -> int:
    return sum(t.nbytes for f in folder.glob("*.safetensors") for t in mx.load(str(f)).values())


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recommended_recipe_runs_and_is_no_larger_than_mlx_lms_four_bits(path, tmp_path):
    family = next(name for start, name in FAMILIES.items() if path.stem.startswith(start))
    source, model = tiny_model(family, tmp_path / "model", dtype=mx.bfloat16, **SIZES)
    calibration = calibrated(source, model, tmp_path / "calibration", projections=PROJECTIONS)
    recipe = Recipe(**load_recipe_fields(path))
    compress(
        source,
        make_plan(source, recipe, calibration=calibration),
        tmp_path / "out",
        calibration=calibration,
    )
    # Bit for bit what mlx-lm's converter writes: see test_quantized.
    stock = make_plan(source, Recipe(rules=(Rule(skip=True),), quantize=quantization(4)))
    assert tensor_bytes(tmp_path / "out") <= stock.bytes_after
    assert mx.isfinite(load_model(tmp_path / "out")[0](mx.array([[1, 2, 3]]))).all()
