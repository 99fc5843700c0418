"""Random checkpoints in the Hugging Face layout, written with little memory.

Run as ``python -m benchmarks.checkpoints FOLDER MODEL``: the process that measures memory does
not generate weights itself.
"""

import json
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

SHARD_BYTES = 1 << 30
_CHUNK = 1 << 22


def llama(layers: int, hidden: int, intermediate: int, heads: int, kv: int, vocab: int) -> dict:
    """config.json of a Llama; heads of hidden / heads numbers, ``kv`` of them for k and v."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


MODELS = {
    "4GB": llama(18, hidden=2048, intermediate=16384, heads=32, kv=8, vocab=32000),
    "tiny": llama(2, hidden=128, intermediate=256, heads=4, kv=2, vocab=512),
}


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, in the order of the files."""
    n, inner = config["hidden_size"], config["intermediate_size"]
    kv = n // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], n)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj.weight": (n, n),
            f"model.layers.{i}.self_attn.k_proj.weight": (kv, n),
            f"model.layers.{i}.self_attn.v_proj.weight": (kv, n),
            f"model.layers.{i}.self_attn.o_proj.weight": (n, n),
            f"model.layers.{i}.mlp.gate_proj.weight": (inner, n),
            f"model.layers.{i}.mlp.up_proj.weight": (inner, n),
            f"model.layers.{i}.mlp.down_proj.weight": (n, inner),
            f"model.layers.{i}.input_layernorm.weight": (n,),
            f"model.layers.{i}.post_attention_layernorm.weight": (n,),
        }
    return shapes | {"model.norm.weight": (n,)}


def total_bytes(config: dict) -> int:
    """Bytes of tensor data in bfloat16."""
    return sum(2 * prod(shape) for shape in tensor_shapes(config).values())


def write(folder: Path, config: dict) -> None:
    """config.json, an index and shards of at most 1 GB, in bfloat16."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensor_shapes(config).items():
        if filled + 2 * prod(shape) > SHARD_BYTES and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += 2 * prod(shape)
    rng = np.random.default_rng(0)
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, shapes, rng)
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {"total_size": total_bytes(config)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for values in _values(shape, rng):
                stream.write((values.view(np.uint32) >> 16).astype(np.uint16))


def _values(shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Float32 values of one tensor, piece by piece: ones for a norm, gaussian for a matrix."""
    left = prod(shape)
    while left:
        count = min(left, _CHUNK)
        if len(shape) == 1:
            yield np.ones(count, dtype=np.float32)
        else:
            yield rng.standard_normal(count, dtype=np.float32) * np.float32(0.02)
        left -= count


if __name__ == "__main__":
    write(Path(sys.argv[1]), MODELS[sys.argv[2]])
