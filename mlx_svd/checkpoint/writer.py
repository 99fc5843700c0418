"""Safetensors shards written tensor by tensor, resumable, complete or absent.

All shapes are known from the plan, so each shard's header is written first and the data is
appended. Everything goes into ``NAME.incomplete``; a journal records each finished unit (a module
of the model) after its bytes are on disk. A killed run continues after the last recorded unit.
Only when every file is there is the folder renamed to ``NAME``.
"""

import errno
import fcntl
import json
import os
import shutil
import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_svd.checkpoint.layout import TensorSpec
from mlx_svd.errors import MlxSvdError

MAX_SHARD_BYTES = 5 << 30
JOURNAL = "journal.jsonl"
_SAFETENSORS_DTYPES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
}


class CheckpointWriter:
    """Writes ``units`` (name, tensors) in order into a new checkpoint folder.

    digest: identifies the run; a journal of another run is refused, never mixed. ``done`` holds
    the records of the units that an earlier, killed run finished; the caller goes on with the
    others in the same order. Raises MlxSvdError if the folder exists, is being written by another
    process, or does not fit on the disk.
    """

    def __init__(
        self,
        target: Path,
        units: list[tuple[str, tuple[TensorSpec, ...]]],
        digest: str,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ):
        self.target, self.digest = target, digest
        self.folder = target.with_name(target.name + ".incomplete")
        if target.exists():
            raise MlxSvdError(f"{target}: exists already; delete it or give another --mlx-path")
        self.units = dict(units)
        self.shards = _assign_shards(units, max_shard_bytes)
        self.shard_of = {n: i for i, names in enumerate(self.shards) for n in names}
        self.headers = [self._header(names) for names in self.shards]
        self.done: dict[str, dict] = {}
        self._stream = None
        with _disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal = self._open_journal()
            self._resume()
            self._check_space()

    # -- writing --------------------------------------------------------------------------

    def write(self, unit: str, tensors: list[mx.array], record: dict) -> None:
        """Append one unit's tensors, in the order of its specs, and record it as finished."""
        shard = self.shard_of[unit]
        with _disk_errors(self.folder):
            stream = self._shard_stream(shard)
            checksum = 0
            for spec, tensor in zip(self.units[unit], tensors, strict=True):
                data = _raw_bytes(spec, tensor)
                checksum = zlib.crc32(data, checksum)
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            end = stream.tell()
            self._log({"unit": unit, "shard": shard, "end": end, "crc": checksum, "record": record})
        self.done[unit] = record

    def finish(self, files: dict[str, bytes]) -> None:
        """Add the small files, the index last, and give the folder its final name."""
        missing = [name for name in self.units if name not in self.done]
        if missing:
            raise AssertionError(f"{len(missing)} units were not written, the first: {missing[0]}")
        with _disk_errors(self.folder):
            if self._stream:
                self._stream.close()
            index = json.dumps(self._index(), indent=4).encode()
            for name, data in {**files, "model.safetensors.index.json": index}.items():
                _write_file(self.folder / name, data)
            (self.folder / JOURNAL).unlink()
            _sync_folder(self.folder)
            os.rename(self.folder, self.target)
            _sync_folder(self.target.parent)
            self._journal.close()

    def close(self) -> None:
        """Release the files of an unfinished run; what is recorded stays for the next one."""
        for stream in (self._stream, self._journal):
            if stream and not stream.closed:
                stream.close()

    # -- layout ---------------------------------------------------------------------------

    def shard_name(self, shard: int) -> str:
        """mlx-lm's names: one file, or numbered ones."""
        if len(self.shards) == 1:
            return "model.safetensors"
        return f"model-{shard + 1:05d}-of-{len(self.shards):05d}.safetensors"

    def _header(self, names: list[str]) -> bytes:
        entries: dict = {"__metadata__": {"format": "mlx"}}
        end = 0
        for name in names:
            for spec in self.units[name]:
                entries[spec.name] = {
                    "dtype": _SAFETENSORS_DTYPES[spec.dtype],
                    "shape": list(spec.shape),
                    "data_offsets": [end, end + spec.nbytes],
                }
                end += spec.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _index(self) -> dict:
        specs = [(s, self.shard_of[u]) for u, tensors in self.units.items() for s in tensors]
        return {
            "metadata": {"total_size": sum(spec.nbytes for spec, _ in specs)},
            "weight_map": {s.name: self.shard_name(i) for s, i in sorted(specs, key=_by_name)},
        }

    # -- resuming -------------------------------------------------------------------------

    def _open_journal(self):
        journal = open(self.folder / JOURNAL, "a+b")  # noqa: SIM115 - lives as long as the writer
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MlxSvdError(f"{self.folder}: another mlx-svd is writing this folder") from error
        return journal

    def _log(self, entry: dict) -> None:
        self._journal.write(json.dumps(entry).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _resume(self) -> None:
        """Take over the finished units of a killed run, after checking their bytes."""
        self._journal.seek(0)
        lines = self._journal.read().split(b"\n")
        entries = [json.loads(line) for line in lines[:-1]]
        if entries and entries[0] != {"digest": self.digest}:
            raise MlxSvdError(
                f"{self.folder}: holds an unfinished run with other settings or another source; "
                "delete it, or repeat the command that began it"
            )
        kept = self._verified(entries[1:])
        self.done = {entry["unit"]: entry["record"] for entry in kept}
        text = [json.dumps(entry).encode() + b"\n" for entry in [{"digest": self.digest}, *kept]]
        self._journal.truncate(0)
        self._journal.write(b"".join(text))
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _verified(self, entries: list[dict]) -> list[dict]:
        """The entries up to the first whose bytes are not on disk as recorded."""
        kept = []
        for expected, entry in zip(self.units, entries, strict=False):
            shard = self.folder / self.shard_name(entry["shard"])
            size = sum(spec.nbytes for spec in self.units[expected])
            if entry["unit"] != expected or not shard.is_file():
                break
            with open(shard, "rb") as stream:
                stream.seek(entry["end"] - size)
                checksum, left = 0, size
                while left and (chunk := stream.read(min(left, 1 << 24))):
                    checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
            if left or checksum != entry["crc"]:
                break
            kept.append(entry)
        return kept

    def _shard_stream(self, shard: int):
        """The open file of the shard, cut to what is recorded of it."""
        path = self.folder / self.shard_name(shard)
        if self._stream is None or Path(self._stream.name) != path:
            if self._stream:
                self._stream.close()
            header = self.headers[shard]
            units = [n for n in self.shards[shard] if n in self.done]
            kept = sum(spec.nbytes for n in units for spec in self.units[n])
            self._stream = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
            self._stream.truncate(len(header) + kept if kept else 0)
            self._stream.write(header)
            self._stream.seek(0, os.SEEK_END)
        return self._stream

    def _check_space(self) -> None:
        needed = sum(
            s.nbytes for n, specs in self.units.items() if n not in self.done for s in specs
        )
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise MlxSvdError(
                f"{self.target}: needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are "
                "free; free some space or give another --mlx-path"
            )


class _disk_errors:
    """OSError -> one line that says what to do; the run can be continued afterwards."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            reason = "no space left on the disk" if full else f"cannot write: {error.strerror}"
            raise MlxSvdError(
                f"{self.folder}: {reason}; the same command continues where it stopped"
            ) from error


def _assign_shards(
    units: list[tuple[str, tuple[TensorSpec, ...]]], max_shard_bytes: int
) -> list[list[str]]:
    """Units in order, into files of at most ``max_shard_bytes``; a larger unit has its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensors in units:
        size = sum(spec.nbytes for spec in tensors)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _raw_bytes(spec: TensorSpec, tensor: mx.array) -> memoryview:
    """The tensor's bytes without a copy where its memory is contiguous."""
    if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
        raise AssertionError(
            f"{spec.name}: planned {spec.shape} {spec.dtype}, got {tensor.shape} {tensor.dtype}"
        )
    tensor = mx.contiguous(tensor)
    if tensor.dtype == mx.bfloat16:  # numpy has no bfloat16
        tensor = tensor.view(mx.uint16)
    return memoryview(np.ascontiguousarray(np.array(tensor, copy=False))).cast("B")


def _by_name(item: tuple[TensorSpec, int]) -> str:
    return item[0].name


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
