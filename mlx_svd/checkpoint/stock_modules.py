"""The Linear modules of a corrected checkpoint as the original architecture has them.

Each is a weight, and the corrections of its rows. Parts of a fused module (q, k, v of GPT-2, Phi-3
and GPT-NeoX), which stand alone in the checkpoint, are joined again.
"""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_svd.checkpoint.layout import TensorSpec
from mlx_svd.errors import MlxSvdError
from mlx_svd.source.families import join_rows

Tensors = dict[str, mx.array]
_AGAIN = "copy or download the checkpoint again"


@dataclass(frozen=True)
class Part:
    """Some rows (m, n) of a module. path: of the projection; holder: path of the Linear with its
    weight; rank: of its correction, 0: it has none."""

    path: str
    holder: str
    shape: tuple[int, int]
    rank: int


@dataclass(frozen=True)
class StockModule:
    """One nn.Linear of the original architecture. specs: the tensors that it stores in a stock
    checkpoint; dtype: of its factors; interleaved_heads: as in ``LinearModule``."""

    path: str
    parts: tuple[Part, ...]
    interleaved_heads: int
    specs: tuple[TensorSpec, ...]
    dtype: mx.Dtype | None

    @property
    def rank(self) -> int:
        """Of the corrections of all parts side by side."""
        return sum(part.rank for part in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def weights(self, take) -> list[mx.array]:
        """The tensors of ``specs``. take: name in the checkpoint -> tensor."""
        kinds = [spec.name.rpartition(".")[2] for spec in self.specs]
        rows = [[take(f"{part.holder}.{kind}") for part in self.parts] for kind in kinds]
        return [join_rows(parts, self.interleaved_heads) for parts in rows]

    def lora(self, rank: int, take) -> list[mx.array]:
        """lora_a (n, rank) and lora_b (rank, m) with x lora_a lora_b = all corrections of x.

        The downs stand side by side in lora_a, each up in its own rows and columns of lora_b;
        what is left of ``rank`` is zero. take: as in :meth:`weights`.
        """
        downs, ups, begin = [], [], 0
        for part in self.parts:
            up = mx.zeros((part.shape[0], rank), dtype=self.dtype)
            if part.rank:
                downs.append(take(f"{part.path}.down.weight").astype(self.dtype))
                own = take(f"{part.path}.up.weight").astype(self.dtype)
                up[:, begin : begin + part.rank] = own
                begin += part.rank
            ups.append(up)
        if rank > begin:
            downs.append(mx.zeros((rank - begin, self.shape[1]), dtype=self.dtype))
        lora_a, lora_b = mx.concatenate(downs).T, join_rows(ups, self.interleaved_heads).T
        return [mx.contiguous(lora_a), mx.contiguous(lora_b)]


def stock_modules(
    folder: Path, section: dict, units: dict[str, tuple[TensorSpec, ...]]
) -> list[StockModule]:
    """Modules with corrections, and fused modules that stand apart in the checkpoint.

    section: its ``mlx_svd`` section; units: module -> stored tensors. Raises MlxSvdError that
    names the projection which a stock model with a LoRA adapter cannot hold.
    """
    entries = section["projections"]
    for path, entry in entries.items():
        if entry["form"] not in ("dense", "corrected"):
            raise MlxSvdError(
                f"{path}: is stored {entry['form']}, which an adapter cannot express; compress "
                "again with form corrected or dense"
            )
    if not any(entry["form"] == "corrected" for entry in entries.values()):
        raise MlxSvdError(
            f"{folder}: has no corrected projection to make an adapter from; compress with form "
            "corrected, or use the checkpoint as it is"
        )
    modules = [
        _module(path, [_part(path, entry, units)], 0, units)
        for path, entry in entries.items()
        if entry["form"] == "corrected" and not entry["fused"]
    ]
    for path, fused in section["fused"].items():
        names = [f"{path}.{name}" for name in fused["parts"]]
        if missing := [name for name in names if name not in entries]:
            raise MlxSvdError(f"{folder / 'config.json'}: does not describe {missing[0]}; {_AGAIN}")
        parts = [_part(name, entries[name], units) for name in names]
        modules.append(_module(path, parts, fused["interleaved_heads"], units))
    return modules


def stock_config(config: dict, modules: list[StockModule]) -> dict:
    """The config of the stock checkpoint. config: of the corrected one; modules: those that have
    another path or other children there."""
    own = ("mlx_svd", "model_file", "quantization", "quantization_config")
    stock = {key: value for key, value in config.items() if key not in own}
    if not config.get("quantization"):
        return dict(sorted(stock.items()))
    paths = {part.holder: module.path for module in modules for part in module.parts}
    factors = {
        f"{part.path}.{name}"
        for module in modules
        for part in module.parts
        for name in ("down", "up")
    }
    section = {
        paths.get(key, key): value
        for key, value in config["quantization"].items()
        if key not in factors
    }
    stock["quantization"] = stock["quantization_config"] = section
    return dict(sorted(stock.items()))


def _part(path: str, entry: dict, units: dict[str, tuple[TensorSpec, ...]]) -> Part:
    shape = tuple(entry["shape"])
    if entry["form"] == "dense":
        return Part(path, path, shape, 0)
    factors = [units.get(f"{path}.{name}", ()) for name in ("down", "up")]
    if any(spec.name.endswith(".scales") for specs in factors for spec in specs):
        raise MlxSvdError(
            f"{path}: its factors are quantized, which those of an adapter cannot be; compress "
            "again without factor_bits"
        )
    rank = entry["ranks"][0]
    expected = [((rank, shape[1]),), ((shape[0], rank),)]
    if [tuple(spec.shape for spec in specs) for specs in factors] != expected:
        raise MlxSvdError(f"{path}: its factors are missing or of another shape; {_AGAIN}")
    return Part(path, f"{path}.base", shape, rank)


def _module(
    path: str,
    parts: list[Part],
    interleaved_heads: int,
    units: dict[str, tuple[TensorSpec, ...]],
) -> StockModule:
    stored = [units.get(part.holder, ()) for part in parts]
    for part, specs in zip(parts, stored, strict=True):
        if f"{part.holder}.weight" not in {spec.name for spec in specs}:
            raise MlxSvdError(f"{part.path}: its weight is missing; {_AGAIN}")
    layouts = [
        {spec.name.rpartition(".")[2]: (spec.shape[1:], spec.dtype) for spec in specs}
        for specs in stored
    ]
    for part, layout in zip(parts, layouts, strict=True):
        # Equal packed shapes of weights and scales mean equal bits and group sizes.
        if layout != layouts[0]:
            raise MlxSvdError(
                f"{part.path}: is not quantized like {parts[0].path}, and a stock model holds both "
                f"in one module, {path}; compress again with the same bits and group size for both"
            )
    rows: dict[str, int] = {}
    for spec in (spec for specs in stored for spec in specs):
        kind = spec.name.rpartition(".")[2]
        rows[kind] = rows.get(kind, 0) + spec.shape[0]
    specs = [
        TensorSpec(f"{path}.{kind}", (rows[kind], *shape), dtype)
        for kind, (shape, dtype) in layouts[0].items()
    ]
    dtypes = {
        spec.dtype
        for part in parts
        for name in ("down", "up")
        for spec in units.get(f"{part.path}.{name}", ())
        if part.rank
    }
    dtype = dtypes.pop() if len(dtypes) == 1 else mx.float32 if dtypes else None
    return StockModule(path, tuple(parts), interleaved_heads, tuple(specs), dtype)
