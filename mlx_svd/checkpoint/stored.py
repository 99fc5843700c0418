"""The tensors of a finished checkpoint, module by module, as a writer takes them."""

from pathlib import Path

import mlx.core as mx

from mlx_svd.checkpoint.layout import TensorSpec
from mlx_svd.checkpoint.shards import SAFETENSORS_DTYPES
from mlx_svd.errors import MlxSvdError
from mlx_svd.source.headers import read_headers

_DTYPES = {written: dtype for dtype, written in SAFETENSORS_DTYPES.items()}
Units = list[tuple[str, tuple[TensorSpec, ...]]]


def stored_units(folder: Path) -> Units:
    """Module -> its tensors, in the order of the files. Raises MlxSvdError for a dtype that no
    checkpoint of mlx-svd or mlx-lm has, and for damaged files."""
    units: dict[str, list[TensorSpec]] = {}
    for name, header in read_headers(folder).items():
        if header.dtype not in _DTYPES:
            raise MlxSvdError(
                f"{header.file}: tensor {name} has dtype {header.dtype}, which cannot be written "
                "again; give a checkpoint made by mlx-svd or mlx-lm"
            )
        spec = TensorSpec(name, header.shape, _DTYPES[header.dtype])
        units.setdefault(name.rpartition(".")[0], []).append(spec)
    return [(module, tuple(specs)) for module, specs in units.items()]


def stored_tensors(folder: Path) -> dict[str, mx.array]:
    """All tensors of a checkpoint, lazy, under the names in its files."""
    tensors: dict[str, mx.array] = {}
    for file in sorted({header.file for header in read_headers(folder).values()}):
        tensors |= mx.load(str(file))
    return tensors
