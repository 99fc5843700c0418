"""Text from a file, a hub data set or the package -> windows of token ids of equal length."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.source.source import brief

# Written for this package: encyclopedic and narrative prose, dialogue, instructions, code.
SHIPPED_TEXT = Path(__file__).with_name("text.txt")
# Characters of a hub data set that are read at most; more tokens than any calibration needs.
_HUB_CHARACTERS = 1 << 24


@dataclass(frozen=True)
class Windows:
    """tokens: (count, length) int32; origin: where the text is from; digest: SHA-256 of the
    tokens; available: how many windows the whole text has."""

    tokens: np.ndarray
    origin: str
    digest: str
    available: int

    def __len__(self) -> int:
        return len(self.tokens)


def read_windows(
    tokenizer: Any,
    text: str | Path | None = None,
    *,
    count: int | None = None,
    length: int = 512,
    vocab_size: int | None = None,
) -> Windows:
    """``count`` windows of ``length`` tokens, spread evenly over the text (None: all of them).

    text: a file (.jsonl: the "text" field of every line), a hub data set ("owner/name" or
    "owner/name:split:column"), or None for the text shipped with the package. vocab_size: token
    ids must be below it. Fewer windows are returned where the text is shorter: compare ``len``
    with ``count``. Raises MlxSvdError that names the file when it is empty, unreadable or shorter
    than one window.
    """
    origin, content = _read(text)
    # verbose: no warning that the text is longer than the model's context; windows are not.
    ids = np.asarray(tokenizer.encode(content, verbose=False), dtype=np.int64)
    available = len(ids) // length
    if not available:
        raise MlxSvdError(
            f"{origin}: has {len(ids)} tokens, which is less than one window of {length}; give a "
            "longer text or shorter windows"
        )
    if vocab_size is not None and ids.max() >= vocab_size:
        raise MlxSvdError(
            f"{origin}: token id {ids.max()} is beyond the model's vocabulary of {vocab_size}; "
            "tokenizer and model do not belong together"
        )
    windows = ids[: available * length].reshape(available, length)
    if count is not None and count < available:
        windows = windows[np.linspace(0, available - 1, count).round().astype(int)]
    tokens = np.ascontiguousarray(windows, dtype=np.int32)
    return Windows(tokens, origin, hashlib.sha256(tokens.tobytes()).hexdigest(), available)


def _read(text: str | Path | None) -> tuple[str, str]:
    """(origin, content)."""
    if text is None:
        return "the text shipped with mlx-svd", SHIPPED_TEXT.read_text(encoding="utf-8")
    path = Path(text).expanduser()
    if path.is_file():
        content = _jsonl(path) if path.suffix == ".jsonl" else _plain(path)
        if not content.strip():
            raise MlxSvdError(f"{path}: is empty; give a text to calibrate or evaluate on")
        return path.name, content
    if path.exists() or str(text).count("/") != 1 or str(text).startswith((".", "~", "/")):
        raise MlxSvdError(f"{text}: no such text file; give a file or a hub data set (owner/name)")
    return str(text), _hub(str(text))


def _plain(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MlxSvdError(f"{path}: cannot be read as text: {brief(error)}") from error


def _jsonl(path: Path) -> str:
    texts = []
    # Only "\n" ends a line: JSON strings may hold the other separators that splitlines knows.
    for number, line in enumerate(_plain(path).split("\n"), 1):
        try:
            text = json.loads(line)["text"] if line.strip() else ""
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise MlxSvdError(f'{path}: line {number} is not a JSON object with a "text" field')
        texts.append(text)
    return "\n\n".join(texts)


def _hub(name: str) -> str:
    name, split, column = (*name.split(":"), "", "")[:3]
    try:
        import datasets
    except ImportError as error:
        raise MlxSvdError(
            f"{name}: no such file, and hub data sets need the extra: pip install 'mlx-svd[eval]'"
        ) from error
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        parts, size = [], 0
        for row in rows:
            parts.append(row[column or "text"])
            size += len(parts[-1])
            if size > _HUB_CHARACTERS:
                break
    # Whatever a data set's loader raises: no network, no such name, split or column.
    except Exception as error:
        raise MlxSvdError(
            f"{name}: no such file, and the hub data set cannot be read: {brief(error)}; check "
            "the name (owner/name:split:column) and the network"
        ) from error
    return "\n\n".join(parts)
