"""A tiny model with a tokenizer, which the programs of mlx-lm can read."""

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.demo import DEMO_MODEL
from tests.tiny import write_tiny

VOCAB = 8192  # of the demo model, whose tokenizer is copied
# Sizes that make every matrix have columns in groups of 64.
_DENSE = {"intermediate_size": 128}
_SIZES = {
    **{family: _DENSE for family in ("qwen2", "qwen3", "phi3")},
    **{family: {**_DENSE, "head_dim": 16} for family in ("mistral", "gemma2", "gemma3_text")},
    # Complete enough for stock mlx-lm, too.
    "llama": {**_DENSE, "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """family -> a random bfloat16 model folder, made on first use."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("tiny") / family
            sizes = {"vocab_size": VOCAB, **_SIZES.get(family, {})}
            write_tiny(family, folder, dtype=mx.bfloat16, **sizes)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(DEMO_MODEL / file, folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture(scope="session")
def windows() -> np.ndarray:
    """(8, 32) random token ids."""
    return np.random.default_rng(0).integers(0, VOCAB, (8, 32), dtype=np.int32)
