"""The arms of ``sweep-kv``: ways to keep keys and values, under short names.

``dense``; ``q8`` (mlx-lm's quantized cache, also q6, q5, q4, q3, q2); latents
``lowrank[:option=value,...]`` with the options of ``KVSettings`` (keys, values, group, rank, share,
energy, bytes, bits, gs, part); ``mla:rank=..,pairs=..[,bits=..]``. ``share`` is a share of the full
rank, ``bytes=q8`` the budget of that arm.
"""

from dataclasses import dataclass, field
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.kv.settings import KVSettings

_MLA = {"rank", "share", "pairs", "bits", "gs"}
_LOWRANK = _MLA - {"pairs"} | {"keys", "values", "group", "energy", "bytes", "part"}
_OPTIONS = {"lowrank": _LOWRANK, "mla": _MLA}
_TEXT = {"keys", "values", "part"}
# Of ``sweep-kv``: rivals, then latents at their bytes.
DEFAULT_ARMS = (
    *("q8", "q4", "q3"),
    *("lowrank:group=all,bytes=q8", "lowrank:group=all,share=0.5,bits=8"),
    *("lowrank:group=all,bits=8", "lowrank:group=all,bits=4", "lowrank:bits=4"),
)
QUANTIZED = {f"q{bits}": bits for bits in (8, 6, 5, 4, 3, 2)}


@dataclass(frozen=True)
class Arm:
    """name: as given; kind: dense, quantized, lowrank or mla; options: parsed values."""

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


def parse_arm(name: str) -> Arm:
    """Raises MlxSvdError for a name that is none, with the options there are."""
    kind, _, rest = name.partition(":")
    if name == "dense":
        return Arm(name, "dense")
    if name in QUANTIZED:
        return Arm(name, "quantized", {"bits": QUANTIZED[name]})
    if kind not in _OPTIONS:
        known = ", ".join(["dense", *QUANTIZED, *_OPTIONS])
        raise MlxSvdError(f"arm {name}: starts with none of {known}")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in _OPTIONS[kind]:
            raise MlxSvdError(f"arm {name}: {part} is none of {', '.join(sorted(_OPTIONS[kind]))}")
        options[key] = _value(name, key, value)
    return Arm(name, kind, options)


def _value(name: str, key: str, value: str) -> Any:
    if key in _TEXT or (key == "bytes" and value in QUANTIZED) or (key, value) == ("group", "all"):
        return value
    try:
        return float(value) if key in ("share", "energy", "bytes") else int(value)
    except ValueError as error:
        raise MlxSvdError(f"arm {name}: {key}={value} is not a number") from error


def settings_of(arm: Arm, head_dim: int, budgets: dict[str, float]) -> KVSettings:
    """Settings of a lowrank arm; budgets: bytes per token of the quantized arms."""
    o = arm.options
    rank = o.get("rank")
    if "share" in o:
        rank = max(1, round(o["share"] * head_dim))
    group = o.get("group", 1)
    budget = o.get("bytes")
    return KVSettings(
        keys=o.get("keys", "kq"),
        values=o.get("values", "output"),
        heads_per_group=None if group == "all" else group,
        rank=rank,
        energy=o.get("energy"),
        bytes_per_token=budgets[budget] if isinstance(budget, str) else budget,
        bits=o.get("bits"),
        group_size=o.get("gs", 64),
        part=o.get("part", "both"),
    )
