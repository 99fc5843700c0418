"""What identifies a model: the bytes of its weights, config and tokenizer."""

import hashlib
from pathlib import Path

_FILES = ("config.json", "*.safetensors", "*token*.json", "vocab.json", "merges.txt", "*.model")


def model_digest(folder: Path) -> str:
    """SHA-256 over names and content of the files that numbers depend on, in the order of their
    names. Reading takes about a second per gigabyte."""
    total = hashlib.sha256()
    for path in sorted({p for pattern in _FILES for p in folder.glob(pattern)}):
        with open(path, "rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{path.name}\0{content}\n".encode())
    return total.hexdigest()
