"""Tiny models with calibrated bases."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_svd.calibrate.text import Windows
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.kv.bases import bases_info
from mlx_svd.kv.bases_file import Bases
from mlx_svd.kv.moments import measure_moments
from tests.tiny import VOCAB, write_tiny

# Of every kind of attention that is supported: GQA with biases, GQA with tied embeddings, fused
# q, k, v with learned positions, unscaled scores with local layers; all but the last in tests of
# the real models, too.
FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neo", "qwen3", "phi3", "gpt_neox")


@dataclass(frozen=True)
class Tiny:
    """A loaded tiny model, its bases and tokens (2, 40) that the bases were not made from."""

    folder: Path
    model: nn.Module
    config: dict
    bases: Bases
    tokens: mx.array

    @property
    def type(self) -> str:
        return self.config["model_type"]

    @property
    def heads(self) -> list[tuple[int, int]]:
        return [(m.heads[1], m.head_dim) for m in self.bases.layers]


def windows(count: int = 6, length: int = 40, seed: int = 3) -> Windows:
    """Random tokens in place of a text."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (count, length)).astype(np.int32)
    return Windows(tokens, "random", hashlib.sha256(tokens.tobytes()).hexdigest(), count)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """(family, changes of its config) -> the model, made on first use. Attach within the test."""
    made: dict[str, Tiny] = {}

    def make(family: str, **overrides) -> Tiny:
        key = f"{family} {sorted(overrides.items())}"
        if key not in made:
            folder = write_tiny(family, tmp_path_factory.mktemp("kv") / family, **overrides)
            model, config = load_model(folder, dtype="float32")
            text = windows()
            moments = measure_moments(model, config["model_type"], text)
            info = bases_info(family, folder, config["model_type"], text)
            tokens = mx.array(windows(2, 40, seed=9).tokens)
            made[key] = Tiny(folder, model, config, Bases(info, moments), tokens)
        return made[key]

    return make
