"""Which file of a checkpoint holds which tensors, and where: known before any weight is."""

import json

import mlx.core as mx

from mlx_svd.checkpoint.layout import TensorSpec, total_bytes

MAX_SHARD_BYTES = 5 << 30
SAFETENSORS_DTYPES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
}


class Shards:
    """The safetensors files for ``units`` (name, tensors), in order.

    shards: unit names of each file; shard_of: unit -> file number; headers: each file's first
    bytes; offset_of: unit -> where its data begins in its file. single_file: the name of the one
    file that holds everything, in place of mlx-lm's names of weight files.
    """

    def __init__(
        self,
        units: list[tuple[str, tuple[TensorSpec, ...]]],
        max_shard_bytes: int,
        single_file: str | None = None,
    ):
        self.units = dict(units)
        self.single_file = single_file
        self.shards = (
            [[name for name, _ in units]] if single_file else _assign_shards(units, max_shard_bytes)
        )
        self.shard_of = {n: i for i, names in enumerate(self.shards) for n in names}
        self.headers = [self._header(names) for names in self.shards]
        self.offset_of = self._offsets()

    def name(self, shard: int) -> str:
        """mlx-lm's file names: one file, or numbered ones."""
        if self.single_file:
            return self.single_file
        if len(self.shards) == 1:
            return "model.safetensors"
        return f"model-{shard + 1:05d}-of-{len(self.shards):05d}.safetensors"

    def _header(self, names: list[str]) -> bytes:
        entries: dict = {"__metadata__": {"format": "mlx"}}
        end = 0
        for name in names:
            for spec in self.units[name]:
                entries[spec.name] = {
                    "dtype": SAFETENSORS_DTYPES[spec.dtype],
                    "shape": list(spec.shape),
                    "data_offsets": [end, end + spec.nbytes],
                }
                end += spec.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def index(self) -> dict:
        """The content of model.safetensors.index.json."""
        specs = [(s, self.shard_of[u]) for u, tensors in self.units.items() for s in tensors]
        return {
            "metadata": {"total_size": sum(spec.nbytes for spec, _ in specs)},
            "weight_map": {s.name: self.name(i) for s, i in sorted(specs, key=_by_name)},
        }

    def _offsets(self) -> dict[str, int]:
        """Unit -> where its data begins in its shard's file."""
        offsets = {}
        for header, names in zip(self.headers, self.shards, strict=True):
            end = len(header)
            for name in names:
                offsets[name] = end
                end += total_bytes(self.units[name])
        return offsets


def _assign_shards(
    units: list[tuple[str, tuple[TensorSpec, ...]]], max_shard_bytes: int
) -> list[list[str]]:
    """Units in order, into files of at most ``max_shard_bytes``; a larger unit has its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensors in units:
        size = total_bytes(tensors)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _by_name(item: tuple[TensorSpec, int]) -> str:
    return item[0].name
