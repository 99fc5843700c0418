"""Writing to disk so that a crash leaves either the old state or the new one."""

import errno
import os
from pathlib import Path

from mlx_svd.errors import MlxSvdError

_FULL = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too large for this disk",
}


class disk_errors:
    """OSError -> one line that says what to do; the run can be continued afterwards. option: of
    the command, which names another folder."""

    def __init__(self, folder: Path, option: str = "--mlx-path"):
        self.folder, self.option = folder, option

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, OSError):
            return
        reason = _FULL.get(error.errno, f"cannot be written: {error.strerror or error}")
        remedy = "make room" if error.errno in _FULL else "make it writable"
        raise MlxSvdError(
            f"{self.folder}: {reason}; {remedy} and repeat the command, which continues where it "
            f"stopped, or give another {self.option}"
        ) from error


def write_all(stream, data: bytes | memoryview) -> None:
    """Unbuffered files may take less than all at once."""
    data = memoryview(data)
    while data:
        data = data[stream.write(data) :]


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and wait until it is on disk."""
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file that appears, or takes the place of the old one, when it is complete."""
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path.parent):
        write_file(partial, data)
        partial.rename(path)


def sync_folder(folder: Path) -> None:
    """Wait until new, renamed and removed names of a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
