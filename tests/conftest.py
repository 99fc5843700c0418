"""Fixtures for all tests."""

import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.checkpoint.loader import load_model
from mlx_svd.compress import compress
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.plan import Plan
from mlx_svd.plan.recipe import Recipe
from mlx_svd.source.source import open_source

SHARED = Path(
    os.environ.get("MLX_SVD_SHARED", Path(__file__).resolve().parents[1].parent / "shared")
)
SHARED_MODELS = ("qwen2-6m", "qwen2-16m", "gpt2-14m", "gpt-neo-8m", "llama-44m")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real models and texts. Missing: a failure in CI, a skip elsewhere."""
    if not (SHARED / "models").is_dir():
        reason = f"the real test models are not in {SHARED} (set MLX_SVD_SHARED)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return SHARED


@pytest.fixture
def compressed(tmp_path: Path) -> Callable[..., tuple[Path, Plan]]:
    """(model folder, recipe) -> (checkpoint folder, plan)."""
    count = 0

    def run(model: Path, recipe: Recipe, **options) -> tuple[Path, Plan]:
        nonlocal count
        count += 1
        source = open_source(str(model))
        plan = make_plan(source, recipe)
        return compress(source, plan, tmp_path / f"checkpoint-{count}", **options), plan

    return run


def logits(folder: Path, length: int = 40) -> np.ndarray:
    """Float32 logits (length, vocabulary) of a model folder on fixed random tokens."""
    model, config = load_model(folder, dtype="float32")
    tokens = np.random.default_rng(1).integers(0, config["vocab_size"], length)
    return np.array(model(mx.array(tokens)[None])[0].astype(mx.float32))


def relative_difference(got: np.ndarray, expected: np.ndarray) -> float:
    """max |got - expected| / max |expected|."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def source_weights(folder: Path) -> dict[str, np.ndarray]:
    """Projection path -> original weight (m, n) float64."""
    source = open_source(str(folder))
    stream = source.stream()
    weights = {}
    for linear in source.linears:
        parts = linear.split(stream.take(f"{linear.path}.weight").astype(mx.float32))
        weights |= {p.path: np.array(parts[p.name], dtype=np.float64) for p in linear.projections}
    return weights


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Calibrations made by the commands go into a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_SVD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
