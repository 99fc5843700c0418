"""What a folder's safetensors files say they hold, checked before any weight is read."""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mlx_svd.errors import MlxSvdError

# What MLX can read. 8-bit floats and packed formats of other quantizers are not among them.
DTYPE_BYTES = {
    **{"F32": 4, "F16": 2, "BF16": 2},
    **{"U64": 8, "U32": 4, "U16": 2, "U8": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "BOOL": 1},
}
INDEX_FILE = "model.safetensors.index.json"
# What reading JSON that is not as expected can raise.
_MALFORMED = (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError)


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a safetensors file: dtype as written there (BF16, F16, F32), bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Headers of all ``model*.safetensors`` in the folder, by tensor name as written there.

    Raises MlxSvdError that names the file or tensor: no weight files, truncated or corrupt file,
    a tensor named twice, an index that names an absent tensor or file, an unusable dtype.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise MlxSvdError(_no_weights(folder))
    headers: dict[str, TensorHeader] = {}
    for file in files:
        for header in _read_file(file):
            if header.name in headers:
                other = headers[header.name].file.name
                raise MlxSvdError(
                    f"{file}: tensor {header.name} is also in {other}; delete the stale file"
                )
            headers[header.name] = header
    _check_index(folder / INDEX_FILE, headers)
    return headers


def _no_weights(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")):
        return (
            f"{folder}: holds only PyTorch .bin weights; convert them to safetensors first "
            "(transformers: from_pretrained, then save_pretrained)"
        )
    return f"{folder}: no model*.safetensors file in this folder; give a Hugging Face model folder"


def _read_file(file: Path) -> list[TensorHeader]:
    """Header of one file; its tensors must fill the file without gaps or overlaps."""
    damaged = f"{file}: truncated or corrupt safetensors file"
    remedy = "; download or copy it again"
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if 8 + length > size:
                raise MlxSvdError(f"{damaged} ({size} bytes, too short for its header){remedy}")
            text = stream.read(length)
    except OSError as error:
        raise MlxSvdError(f"{file}: cannot be read ({error.strerror}){remedy}") from error
    try:
        entries = json.loads(text.decode())
        entries.pop("__metadata__", None)
        found = [_entry(file, name, entry) for name, entry in entries.items()]
        end = 0
        for begin, next_end in sorted(entry["data_offsets"] for entry in entries.values()):
            if begin != end:
                raise ValueError("tensors overlap or leave a gap")
            end = next_end
    except _MALFORMED as error:
        raise MlxSvdError(f"{damaged} (unreadable header){remedy}") from error
    if 8 + length + end != size:
        raise MlxSvdError(f"{damaged} ({size} bytes, its header needs {8 + length + end}){remedy}")
    return found


def _entry(file: Path, name: str, entry: dict) -> TensorHeader:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in DTYPE_BYTES:
        raise MlxSvdError(
            f"{file}: tensor {name} has dtype {dtype}; give the original model in "
            "bfloat16, float16 or float32"
        )
    begin, end = entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise ValueError(name)
    if end - begin != prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(name)
    return TensorHeader(name, dtype, shape, end - begin, file)


def _check_index(index: Path, headers: dict[str, TensorHeader]) -> None:
    """Every tensor that the index names must be in the file that it names."""
    if not index.is_file():
        return
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"].items()
        if not all(isinstance(file, str) for _, file in weight_map):
            raise TypeError("weight_map names no files")
    except (*_MALFORMED, OSError) as error:
        raise MlxSvdError(f"{index}: not a valid index; download it again") from error
    for name, file in weight_map:
        if not (index.parent / file).is_file():
            raise MlxSvdError(f"{index}: names {file}, which is missing; download the model again")
        if name not in headers or headers[name].file.name != file:
            raise MlxSvdError(
                f"{index}: names tensor {name} in {file}, which does not hold it; "
                "download the model again"
            )
