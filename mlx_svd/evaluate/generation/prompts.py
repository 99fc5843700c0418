"""Prompts to continue: from a file, or the ones shipped with the package."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_svd.errors import MlxSvdError
from mlx_svd.source.source import brief

# Written for this package: openings of stories, articles, letters, dialogues, lists, instructions.
SHIPPED_PROMPTS = Path(__file__).with_name("prompts.txt")


@dataclass(frozen=True)
class Prompt:
    """id: names the prompt in records; text: what the model continues."""

    id: str
    text: str


def read_prompts(path: str | Path | None = None, limit: int | None = None) -> list[Prompt]:
    """Prompts of a file, or the shipped ones (None); at most ``limit``, from the start.

    .jsonl: one object a line with "prompt" (or "text") and, if wanted, "id"; any other file: one
    prompt a line, empty lines skipped. Without an id a prompt is named by its line. Raises
    MlxSvdError that names file and line for what cannot be read, and for an id given twice.
    """
    file = SHIPPED_PROMPTS if path is None else Path(path).expanduser()
    if limit is not None and limit < 1:
        raise MlxSvdError(f"--limit {limit}: give at least one prompt")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise MlxSvdError(f"{file}: cannot be read as text: {brief(error)}") from error
    read = _json_prompt if file.suffix == ".jsonl" else _plain_prompt
    prompts = [
        read(f"{file}: line {n}", n, line) for n, line in enumerate(lines, 1) if line.strip()
    ]
    if not prompts:
        raise MlxSvdError(f"{file}: holds no prompts; write one a line")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise MlxSvdError(f"{file}: two prompts have the id {prompt.id!r}; rename one")
        seen.add(prompt.id)
    return prompts[:limit]


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of ids and texts, which tells whether two runs had the same prompts."""
    content = json.dumps([[p.id, p.text] for p in prompts], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def _plain_prompt(where: str, number: int, line: str) -> Prompt:
    return Prompt(f"prompt-{number}", line.strip())


def _json_prompt(where: str, number: int, line: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MlxSvdError(f"{where} is not JSON; write one object a line") from error
    text = row.get("prompt", row.get("text")) if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise MlxSvdError(f'{where} has no text in "prompt"; write {{"prompt": "..."}}')
    return Prompt(str(row.get("id", f"prompt-{number}")), text)
