"""Which projections of a layer are sliced together, and in which architectures that works.

| group | sliced | one number for all members |
|---|---|---|
| qk | rotary pairs, the same in every head | kept dimensions of a head, 2 for each pair |
| vo | value dimensions of every KV head, in a new basis | kept dimensions of a head |
| mlp | neurons | kept neurons |

The sliced matrices stay plain dense ones. Attention code must take the head dimension of the
values from the tensor, and the rotation must be one that can be cut into pairs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.nn as nn
from mlx_lm.models.rope_utils import Llama3RoPE, YarnRoPE

from mlx_svd.errors import MlxSvdError
from mlx_svd.source.families import LinearModule, Projection
from mlx_svd.source.source import Source

GROUPS = {"qk": ("q", "k"), "vo": ("v", "o"), "mlp": ("gate", "up", "down")}
_THIRDS = "its model code cuts q, k and v into three equal parts"
# Families whose model code needs values as wide as queries.
_FIXED_VALUES = {
    "gpt2": _THIRDS,
    "gpt_neox": _THIRDS,
    "gemma2": "its model code reshapes the heads to config.json's head_dim",
}
_QK_NORM = "it normalizes whole query and key heads"
_FIXED_PAIRS = {
    "qwen3": _QK_NORM,
    "gemma3_text": _QK_NORM,
    "gpt2": "it has no rotary positions",
    "gpt_neo": "it has no rotary positions",
    "gemma2": "its model code reshapes the heads to config.json's head_dim",
    "phi3": "its model code cuts the fused qkv_proj by config.json's head size",
    "gpt_neox": "it rotates a part of each head",
}
_ROTATIONS = (nn.RoPE, Llama3RoPE, YarnRoPE)


@dataclass(frozen=True)
class SliceGroup:
    """The projections of one layer that share an inner dimension.

    kind: qk, vo or mlp; members: in the order of ``GROUPS``; heads: of the queries, kv_heads: of
    keys and values (1 and 1 for an MLP); limit: d of a head, or all neurons.
    """

    kind: str
    layer: int
    members: tuple[Projection, ...]
    heads: int
    kv_heads: int
    limit: int

    def member(self, name: str) -> Projection:
        return next(p for p in self.members if p.name == name)

    @property
    def reader(self) -> Projection:
        """The member that closes the group: k, o or down."""
        return self.members[-1]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.members)

    def partners(self, name: str) -> tuple[Projection, ...]:
        """The other members whose weights decide how ``name`` is sliced."""
        needed = {"q": ("k",), "k": ("q",), "v": ("o",), "gate": ("down",), "up": ("down",)}
        return tuple(self.member(other) for other in needed.get(name, ()))

    def stored_shape(self, p: Projection, size: int) -> tuple[int, int]:
        """Shape (m', n') of a member when ``size`` dimensions or neurons are kept."""
        m, n = p.shape
        return (
            (m, n // self.limit * size) if p.name in ("o", "down") else (m // self.limit * size, n)
        )


def slice_groups(linears: Iterable[LinearModule]) -> dict[str, SliceGroup]:
    """Path of every projection -> its group; projections without all partners have none."""
    layers: dict[int, dict[str, Projection]] = {}
    for linear in linears:
        for p in linear.projections:
            layers.setdefault(p.layer, {})[p.name] = p
    found = {}
    for layer, projections in layers.items():
        for kind in GROUPS:
            group = _group(kind, layer, projections)
            if group is not None:
                found |= {p.path: group for p in group.members}
    return found


def _group(kind: str, layer: int, found: dict[str, Projection]) -> SliceGroup | None:
    members = tuple(found[name] for name in GROUPS[kind] if name in found)
    if not members or members[-1].name != GROUPS[kind][-1]:
        return None
    if kind == "mlp":
        return SliceGroup(kind, layer, members, 1, 1, members[-1].shape[1])
    first, last = members
    size, kv_heads = first.shape[0] // first.heads, found["k"].heads
    heads = last.shape[1] // size if kind == "vo" else first.heads
    return SliceGroup(kind, layer, members, heads, kv_heads, size)


def check_sliceable(source: Source, group: SliceGroup) -> None:
    """Raise MlxSvdError that says why this architecture's group cannot be sliced."""
    family, what = source.config["model_type"], "/".join(group.names)
    fixed = {"qk": _FIXED_PAIRS, "vo": _FIXED_VALUES}.get(group.kind, {})
    if reason := fixed.get(family) or (group.kind == "qk" and _unsliceable_rotation(source, group)):
        raise MlxSvdError(f"form sliced: {what} of a {family} model cannot be sliced: {reason}")


def _unsliceable_rotation(source: Source, group: SliceGroup) -> str:
    attention = group.members[0].module.rpartition(".")[0]
    rope = dict(source.skeleton.named_modules())[f"{attention}.rope"]
    if type(rope) not in _ROTATIONS:
        return f"its rotation ({type(rope).__name__}) depends on the length of the text"
    return "it rotates neighbouring dimensions" if rope.traditional else ""
