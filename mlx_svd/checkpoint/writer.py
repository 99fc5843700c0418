"""Safetensors shards written tensor by tensor, resumable, complete or absent.

All shapes are known from the plan, so each shard's header is written first and the data is
appended. Everything goes into ``NAME.incomplete``; a journal records each finished unit (a module
of the model) after its bytes are on disk. A killed run continues after the last recorded unit.
Only when every file is there is the folder renamed to ``NAME``.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_svd.checkpoint.disk import disk_errors, sync_folder, write_all, write_file
from mlx_svd.checkpoint.layout import TensorSpec, total_bytes
from mlx_svd.checkpoint.shards import MAX_SHARD_BYTES, Shards
from mlx_svd.errors import MlxSvdError
from mlx_svd.source.headers import INDEX_FILE

JOURNAL = "journal.jsonl"
# Network file systems that cannot lock a folder: two runs at once are then not noticed.
_NO_LOCKS = (errno.EBADF, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)


class CheckpointWriter:
    """Writes ``units`` (name, tensors) in order into a new checkpoint folder.

    digest: identifies the run; a journal of another run is refused, never mixed. ``done`` holds
    the records of the units that an earlier, killed run finished; the caller goes on with the
    others in the same order. single_file: name of one file that takes everything, and no index;
    last_file: the file that shows a folder to be complete. Raises MlxSvdError if the folder exists,
    is being written by another process, or does not fit on the disk.
    """

    def __init__(
        self,
        target: Path,
        units: list[tuple[str, tuple[TensorSpec, ...]]],
        digest: str,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        *,
        single_file: str | None = None,
        last_file: str = INDEX_FILE,
    ):
        self.target, self.last_file = target, last_file
        self.folder = target.with_name(target.name + ".incomplete")
        self._refuse_existing()
        self.files = Shards(units, max_shard_bytes, single_file)
        self.units = self.files.units
        self._run = {"digest": digest, "layout": zlib.crc32(b"".join(self.files.headers))}
        self.done: dict[str, dict] = {}
        self._stream = self._journal = self._lock = None
        try:
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock_folder()
                self._resume()
                self._check_space()
        except BaseException:
            self.close()
            raise

    # -- writing --------------------------------------------------------------------------

    def write(self, unit: str, tensors: list[mx.array], record: dict) -> None:
        """Append one unit's tensors, in the order of its specs, and record it as finished."""
        expected = list(self.units)[len(self.done)]
        if unit != expected:
            raise AssertionError(f"units out of order: {unit} instead of {expected}")
        with disk_errors(self.folder):
            stream = self._shard_stream(self.files.shard_of[unit])
            checksum = 0
            for spec, tensor in zip(self.units[unit], tensors, strict=True):
                data = _raw_bytes(spec, tensor)
                checksum = zlib.crc32(data, checksum)
                write_all(stream, data)
            os.fsync(stream.fileno())
            self._log({"unit": unit, "crc": checksum, "record": record})
        self.done[unit] = record

    def finish(self, files: dict[str, bytes]) -> None:
        """Add the small files, ``last_file`` last, and give the folder its final name."""
        missing = [name for name in self.units if name not in self.done]
        if missing:
            raise AssertionError(f"{len(missing)} units were not written, the first: {missing[0]}")
        with disk_errors(self.folder):
            if self.files.single_file is None:
                index = json.dumps(self.files.index(), indent=4).encode()
                files = {**files, INDEX_FILE: index}
            for name in sorted(files, key=lambda name: name == self.last_file):
                write_file(self.folder / name, files[name])
            self._refuse_existing()
            sync_folder(self.folder)
            # Killed from here on, the next run finds that file without a journal and starts anew.
            (self.folder / JOURNAL).unlink()
            sync_folder(self.folder)
            os.rename(self.folder, self.target)
            sync_folder(self.target.parent)

    def close(self) -> None:
        """Release the files of an unfinished run; what is recorded stays for the next one. A
        folder in which nothing is recorded is removed."""
        for stream in (self._stream, self._journal):
            if stream:
                stream.close()
        if self._lock is not None:
            if self._journal and not self.done:
                self._empty_folder()
            if not self.done:
                with contextlib.suppress(OSError):  # not empty: it holds another run
                    self.folder.rmdir()
            os.close(self._lock)
        self._stream = self._journal = self._lock = None

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.target):
            raise MlxSvdError(
                f"{self.target}: exists already; delete it or give another --mlx-path"
            )

    # -- resuming -------------------------------------------------------------------------

    def _lock_folder(self) -> None:
        """Lock the folder itself: the lock follows it to its final name."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise MlxSvdError(
                f"{self.folder}: another mlx-svd is writing this folder; wait for it, or give "
                "another --mlx-path"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
        self._lock = descriptor
        self._refuse_existing()  # the other run may have finished just before the lock

    def _log(self, entry: dict) -> None:
        write_all(self._journal, json.dumps(entry).encode() + b"\n")
        os.fsync(self._journal.fileno())

    def _resume(self) -> None:
        """Take over the finished units of a killed run, after checking their bytes."""
        path = self.folder / JOURNAL
        entries = _journal_entries(path.read_bytes() if path.is_file() else b"")
        if entries and entries[0][0] != self._run:
            raise MlxSvdError(
                f"{self.folder}: holds an unfinished run with other settings or another source; "
                "delete it, or repeat the command that began it"
            )
        if not entries:
            self._refuse_foreign()
            self._empty_folder()
        self._journal = open(path, "ab", buffering=0)  # noqa: SIM115 - as long as the writer
        if not entries:
            self._log(self._run)
            sync_folder(self.folder)
            return
        end = entries[0][1]
        for name, (entry, entry_end) in zip(self.units, entries[1:], strict=False):
            if entry.get("unit") != name or entry.get("crc") != self._checksum(name):
                break
            self.done[name], end = entry["record"], entry_end
        os.truncate(path, end)
        self._cut_shards()

    def _refuse_foreign(self) -> None:
        """Without a journal only a run that was killed at its very end leaves anything."""
        others = [path for path in self.folder.iterdir() if path.name != JOURNAL]
        ours = (self.folder / self.last_file).is_file() and all(path.is_file() for path in others)
        if others and not ours:
            raise MlxSvdError(
                f"{self.folder}: is in the way, and not an unfinished run that can be continued; "
                "delete it or give another --mlx-path"
            )

    def _empty_folder(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()

    def _checksum(self, unit: str) -> int | None:
        """CRC of a unit's bytes on disk; None if they or the header before them are missing."""
        shard, offset = self.files.shard_of[unit], self.files.offset_of[unit]
        path, header = self.folder / self.files.name(shard), self.files.headers[shard]
        left, checksum = total_bytes(self.units[unit]), 0
        if not path.is_file():
            return None
        with open(path, "rb") as stream:
            if offset == len(header) and stream.read(offset) != header:
                return None
            stream.seek(offset)
            while left and (chunk := stream.read(min(left, 1 << 24))):
                checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
        return None if left else checksum

    def _cut_shards(self) -> None:
        """Remove what is on disk after the last recorded unit."""
        for shard, names in enumerate(self.files.shards):
            path = self.folder / self.files.name(shard)
            done = [name for name in names if name in self.done]
            if done:
                os.truncate(
                    path, self.files.offset_of[done[-1]] + total_bytes(self.units[done[-1]])
                )
            else:
                path.unlink(missing_ok=True)

    def _shard_stream(self, shard: int):
        """The shard's file, open for appending, its header written."""
        path = self.folder / self.files.name(shard)
        if self._stream is None or self._stream.name != str(path):
            if self._stream:
                self._stream.close()
            # Unbuffered: nothing is left to be written when a full disk has stopped the run.
            self._stream = open(path, "ab", buffering=0)  # noqa: SIM115
            if not path.stat().st_size:
                write_all(self._stream, self.files.headers[shard])
        return self._stream

    def _check_space(self) -> None:
        needed = sum(total_bytes(specs) for n, specs in self.units.items() if n not in self.done)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise MlxSvdError(
                f"{self.target}: needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are "
                "free; free some space or give another --mlx-path"
            )


def _journal_entries(data: bytes) -> list[tuple[dict, int]]:
    """The entries, each with the offset of its end, up to the first torn or damaged line."""
    entries, end = [], 0
    for line in data.split(b"\n")[:-1]:
        end += len(line) + 1
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        entries.append((entry, end))
    return entries


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
