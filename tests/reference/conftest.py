"""Tiny random transformers models, saved as transformers 5 saves them, and their logits.

Run with `make test-reference`; needs torch, which is imported only when a test runs. Logits are
float32 numpy of shape (length, vocab); tokens are int64 numpy of shape (length,).
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_svd.source.source import open_source

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]

VOCAB = 160
LENGTH = 72
_DENSE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_END = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": VOCAB}
# Every family, with GQA where it has it. Windows that mlx-lm knows are shorter than LENGTH.
TINY: dict[str, dict[str, Any]] = {
    "llama": _DENSE,
    "mistral": {**_DENSE, "sliding_window": None, "head_dim": 24},
    "qwen2": {**_DENSE, "tie_word_embeddings": True},
    "qwen3": {**_DENSE, "head_dim": 32},
    "gemma2": {**_DENSE, "head_dim": 24, "query_pre_attn_scalar": 20},
    "gemma3_text": {
        **_DENSE,
        "num_hidden_layers": 4,
        "head_dim": 24,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {**_DENSE, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "gpt2": {**_END, "n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 128},
    "gpt_neox": {
        **{key: value for key, value in _DENSE.items() if key != "num_key_value_heads"},
        "intermediate_size": 256,
        "hidden_act": "gelu_new",
    },
    "gpt_neo": {
        **_END,
        "hidden_size": 64,
        "num_heads": 4,
        "num_layers": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 16,
        "max_position_embeddings": 128,
    },
}


def load_mlx(folder: Path) -> nn.Module:
    """The MLX model of a Hugging Face folder as mlx-svd reads it, in float32."""
    source = open_source(str(folder))
    stream, model = source.stream(), source.skeleton
    model.load_weights([(name, stream.take(name).astype(mx.float32)) for name in source.tensors])
    model.eval()
    return model


def randomize(model: Any) -> None:
    """Give every parameter a value that matters: no bias of zero, no norm weight of one."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.2 * noise + float(name.endswith("weight")))


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def tokens() -> np.ndarray:
    """LENGTH random token ids."""
    return np.random.default_rng(0).integers(0, VOCAB, LENGTH)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """family, config overrides -> (torch model, the folder it was saved to)."""
    import transformers

    def build(family: str, **overrides: Any) -> tuple[Any, Path]:
        config = transformers.AutoConfig.for_model(family, **{**TINY[family], **overrides})
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = model.float().eval()
        randomize(model)
        model.save_pretrained(tmp_path / family)
        return model, tmp_path / family

    return build


@pytest.fixture
def difference() -> Callable[[Any, Path, np.ndarray], float]:
    """torch model, folder, tokens -> max |mlx - torch| / max |torch| over all logits."""
    import torch

    def measure(model: Any, folder: Path, tokens: np.ndarray) -> float:
        with torch.no_grad():
            expected = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
        logits = np.array(load_mlx(folder)(mx.array(tokens)[None])[0])
        assert logits.shape == expected.shape
        value = float(np.abs(logits - expected).max() / np.abs(expected).max())
        print(f"relative difference {value:.2e}")
        return value

    return measure


@pytest.fixture
def edit_config() -> Callable[[Path, Callable[[dict[str, Any]], object]], None]:
    """Apply a function to the saved config.json, in place."""

    def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return edit
