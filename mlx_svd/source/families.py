"""Where each architecture keeps its projections, under mlx-lm's parameter names.

Fused projections (GPT-2 and Phi-3's q, k, v; Phi-3's gate and up; GPT-NeoX's q, k, v interleaved
head by head) are split by rows into parts, so that each part gets its own rank. A part's path is
the fused module's path and the part's name: ``model.h.0.attn.c_attn.q``.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_svd.errors import MlxSvdError

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")
PROJECTIONS = (*ATTENTION, *MLP)

_SEPARATE = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
    "self_attn.o_proj": ("o",),
    "mlp.gate_proj": ("gate",),
    "mlp.up_proj": ("up",),
    "mlp.down_proj": ("down",),
}


@dataclass(frozen=True)
class Family:
    """layers: path of the layer list; modules: path in a layer -> the projections it holds;
    interleaved: a fused q, k, v is laid out head by head; prefix: of the tensor names that
    transformers writes, where mlx-lm does not expect one."""

    layers: str
    modules: dict[str, tuple[str, ...]]
    interleaved: bool = False
    prefix: str = ""


_LLAMA = Family("model.layers", _SEPARATE)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi3": Family(
        "model.layers",
        {
            "self_attn.qkv_proj": ("q", "k", "v"),
            "self_attn.o_proj": ("o",),
            "mlp.gate_up_proj": ("gate", "up"),
            "mlp.down_proj": ("down",),
        },
    ),
    "gpt2": Family(
        "model.h",
        {
            "attn.c_attn": ("q", "k", "v"),
            "attn.c_proj": ("o",),
            "mlp.c_fc": ("up",),
            "mlp.c_proj": ("down",),
        },
        prefix="transformer.",
    ),
    "gpt_neox": Family(
        "model.h",
        {
            "attention.query_key_value": ("q", "k", "v"),
            "attention.dense": ("o",),
            "mlp.dense_h_to_4h": ("up",),
            "mlp.dense_4h_to_h": ("down",),
        },
        interleaved=True,
    ),
    "gpt_neo": Family(
        "model.h",
        {
            "attn.attention.q_proj": ("q",),
            "attn.attention.k_proj": ("k",),
            "attn.attention.v_proj": ("v",),
            "attn.attention.out_proj": ("o",),
            "mlp.c_fc": ("up",),
            "mlp.c_proj": ("down",),
        },
    ),
}


@dataclass(frozen=True)
class Projection:
    """One weight matrix (m, n) that can be compressed on its own.

    path: its own path; module: path of the Linear that holds it (the same unless fused);
    heads: attention heads among its output rows (q, k, v), 0 for the others.
    """

    path: str
    module: str
    name: str
    layer: int
    shape: tuple[int, int]
    heads: int
    bias: bool


@dataclass(frozen=True)
class LinearModule:
    """An nn.Linear of the original model and the projections whose rows it holds, in order.

    interleaved_heads: heads of an interleaved q, k, v; 0 when the parts are stacked.
    """

    path: str
    projections: tuple[Projection, ...]
    interleaved_heads: int = 0

    @property
    def fused(self) -> bool:
        return len(self.projections) > 1

    def split(self, rows: mx.array) -> dict[str, mx.array]:
        """Weight (m, n) or bias (m,) of the module -> projection name -> its rows."""
        names = [p.name for p in self.projections]
        if self.interleaved_heads:
            heads = rows.reshape(self.interleaved_heads, len(names), -1, *rows.shape[1:])
            parts = [heads[:, i].reshape(-1, *rows.shape[1:]) for i in range(len(names))]
        else:
            ends, end = [], 0
            for projection in self.projections[:-1]:
                end += projection.shape[0]
                ends.append(end)
            parts = mx.split(rows, ends) if ends else [rows]
        return dict(zip(names, parts, strict=True))

    def join(self, parts: dict[str, mx.array]) -> mx.array:
        """The inverse of split."""
        return join_rows([parts[p.name] for p in self.projections], self.interleaved_heads)


def join_rows(parts: list[mx.array], interleaved_heads: int = 0) -> mx.array:
    """The rows of a fused module from those of its parts (m_i, ...): stacked, or taken in turns
    from the ``interleaved_heads`` heads of each part; 0: stacked."""
    if interleaved_heads:
        heads = [part.reshape(interleaved_heads, -1, *part.shape[1:]) for part in parts]
        return mx.concatenate(heads, axis=1).reshape(-1, *parts[0].shape[1:])
    return mx.concatenate(parts) if len(parts) > 1 else parts[0]


def check_supported(model_type: str | None) -> None:
    """Raise MlxSvdError that names the type and what is supported."""
    if model_type not in FAMILIES:
        raise MlxSvdError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )


def parameter_names(
    model: nn.Module, model_type: str, tensors: dict[str, mx.array]
) -> dict[str, mx.array]:
    """Tensors as in the files -> under the model's parameter names (mlx-lm's sanitize)."""
    prefix = FAMILIES[model_type].prefix
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return model.sanitize(tensors) if hasattr(model, "sanitize") else tensors


def linear_modules(config: dict, skeleton: nn.Module) -> list[LinearModule]:
    """All linear modules that hold projections, layer by layer.

    config: normalized; skeleton: the original architecture, whose shapes are read, never values.
    """
    family = FAMILIES[config["model_type"]]
    heads = _head_counts(config)
    layers = skeleton
    for name in family.layers.split("."):
        layers = getattr(layers, name)
    found = []
    for index, layer in enumerate(layers):
        modules = dict(layer.named_modules())
        for inner, names in family.modules.items():
            path, linear = f"{family.layers}.{index}.{inner}", modules[inner]
            rows = _rows(names, heads, linear.weight.shape[0])
            parts = tuple(
                Projection(
                    path=f"{path}.{name}" if len(names) > 1 else path,
                    module=path,
                    name=name,
                    layer=index,
                    shape=(rows[name], linear.weight.shape[1]),
                    heads=heads.get(name, 0),
                    bias="bias" in linear,
                )
                for name in names
            )
            interleaved = heads["q"] if family.interleaved and len(names) > 1 else 0
            found.append(LinearModule(path, parts, interleaved))
    return found


def _head_counts(config: dict) -> dict[str, int]:
    queries = next(
        config[k] for k in ("num_attention_heads", "n_head", "num_heads") if config.get(k)
    )
    keys = config.get("num_key_value_heads") or queries
    return {"q": queries, "k": keys, "v": keys}


def _rows(names: tuple[str, ...], heads: dict[str, int], total: int) -> dict[str, int]:
    """Rows of each part of a (fused) module with ``total`` rows."""
    if names[0] != "q":
        return {name: total // len(names) for name in names}
    shares = {name: heads[name] for name in names}
    per_head = total // sum(shares.values())
    return {name: share * per_head for name, share in shares.items()}
