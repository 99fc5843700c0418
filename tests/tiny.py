"""Tiny random models of every family, written as transformers 5 writes them, without torch.

tests/reference shows that these names and layouts are transformers' own.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_svd.models.modeling_mlx_svd import base_module
from mlx_svd.source.config import normalize_config

VOCAB = 96
_DENSE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
TINY: dict[str, dict[str, Any]] = {
    "llama": {**_DENSE, "attention_bias": True},
    "mistral": {**_DENSE, "sliding_window": None, "head_dim": 24},
    "qwen2": {**_DENSE, "tie_word_embeddings": True},
    "qwen3": {**_DENSE, "head_dim": 32},
    "gemma2": {**_DENSE, "head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 128},
    "gemma3_text": {
        **{k: v for k, v in _DENSE.items() if k != "rope_parameters"},
        "head_dim": 24,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": _DENSE,
    "gpt2": {"vocab_size": VOCAB, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128},
    "gpt_neox": {**_DENSE, "intermediate_size": 256, "num_key_value_heads": None},
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_heads": 4,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
        "max_position_embeddings": 128,
    },
}
FAMILIES = tuple(TINY)
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def tiny_config(family: str, **overrides: Any) -> dict[str, Any]:
    """config.json of a tiny model."""
    config = {"model_type": family, "eos_token_id": 0, **TINY[family], **overrides}
    return {k: v for k, v in config.items() if v is not None or k == "sliding_window"}


def write_tiny(
    family: str,
    folder: Path,
    *,
    dtype: mx.Dtype = mx.float32,
    shards: int = 1,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a tiny random model into a new folder; returns the folder."""
    config = tiny_config(family, **overrides)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {n: mx.array(t).astype(dtype) for n, t in tiny_tensors(config, seed).items()}
    write_shards(folder, tensors, shards)
    return folder


def tiny_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors under transformers' names; matrices have decaying spectra."""
    rng = np.random.default_rng(seed)
    normalized = normalize_config(config)
    base = base_module(config["model_type"])
    model = base.Model(base.ModelArgs.from_dict(normalized))
    tensors = {}
    for name, parameter in tree_flatten(model.parameters()):
        if name == "lm_head.weight" and normalized.get("tie_word_embeddings"):
            continue
        tensors[name] = _random(rng, name, parameter.shape)
    return dict(_transformers_tensor(config["model_type"], n, t) for n, t in tensors.items())


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return (0.2 * rng.standard_normal(shape) + ("weight" in name)).astype(np.float32)
    matrix = rng.standard_normal(shape) / np.sqrt(shape[1])
    if min(shape) > 1 and "embed" not in name and "wte" not in name and "wpe" not in name:
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        matrix = (u * s * np.arange(1, len(s) + 1) ** -0.4) @ v
    return matrix.astype(np.float32)


def _transformers_tensor(family: str, name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    """mlx-lm's name and layout -> transformers'."""
    if family == "gpt2":
        name = name.replace("model.", "transformer.", 1)
        return name, np.ascontiguousarray(tensor.T) if name.endswith(_CONV1D) else tensor
    if family == "gpt_neo":
        return name.replace("model.", "transformer.", 1), tensor
    if family == "gpt_neox":
        if name.startswith("model.embed_out"):
            return name.removeprefix("model."), tensor
        return name.replace("model.h.", "model.layers.").replace("model.", "gpt_neox.", 1), tensor
    return name, tensor


def write_shards(folder: Path, tensors: dict[str, mx.array], shards: int) -> None:
    """Safetensors files as on the hub: one, or numbered ones with an index."""
    names = list(tensors)
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
        return
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[index::shards]}
        mx.save_safetensors(str(folder / file), part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
