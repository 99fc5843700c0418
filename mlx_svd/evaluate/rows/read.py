"""Rows of a task, from JSON lines, checked so that a bad one is named with its file and line."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.source.source import brief


@dataclass(frozen=True)
class Row:
    """One question. label: index of the right choice; labels: for questions with several right
    choices, 1 for each of them and 0 for the others; subject: "" without; answer: for questions
    without choices. where: file and line, or where on the hub it is from."""

    id: str
    question: str
    choices: tuple[str, ...] = ()
    label: int = 0
    labels: tuple[int, ...] = ()
    subject: str = ""
    answer: str = ""
    where: str = ""

    def same_content(self, other: "Row") -> bool:
        """Are both the same question? (lm-eval leaves it out of its own examples.)"""
        return self.content() == other.content()

    def content(self) -> tuple:
        """Everything but where it is from."""
        return (self.id, self.question, self.choices, self.label, self.labels, self.subject,
                self.answer)  # fmt: skip


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, object) of every line that is not blank. Raises MlxSvdError naming them."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MlxSvdError(f"{path}: cannot be read as text: {brief(error)}") from error
    found = False
    # Only "\n" ends a line: JSON strings may hold the other separators that splitlines knows.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where, found = f"{path}: line {number}", True
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MlxSvdError(f"{where} is not JSON: {brief(error)}; mend it") from error
        if not isinstance(entry, dict):
            raise MlxSvdError(f"{where} is not a JSON object; give one a line")
        yield where, entry
    if not found:
        raise MlxSvdError(f"{path}: is empty; give one JSON object a line")


def choice_row(where: str, entry: dict[str, Any], number: int) -> Row:
    """A row with question, choices and label (index of the right one); id and subject may be
    missing. Raises MlxSvdError naming file, line and field."""
    choices = _texts(where, entry.get("choices"), '"choices"')
    if len(choices) < 2:
        raise MlxSvdError(f'{where} has one text in "choices"; give at least two to choose from')
    label = entry.get("label")
    if isinstance(label, bool) or not isinstance(label, int):
        raise MlxSvdError(
            f'{where} has no whole number in "label"; give the index of the right choice'
        )
    if not 0 <= label < len(choices):
        raise MlxSvdError(
            f'{where}: "label" is {label}, but there are {len(choices)} choices; use 0 to '
            f"{len(choices) - 1}"
        )
    subject = entry.get("subject", "")
    if not isinstance(subject, str):
        raise MlxSvdError(f'{where} has no text in "subject"; write one or leave it out')
    question = _text(where, entry, "question")
    return Row(_id(entry, number), question, choices, label, subject=subject, where=where)


def answer_row(where: str, entry: dict[str, Any], number: int) -> Row:
    """A row with prompt and answer; id may be missing."""
    question, answer = _text(where, entry, "prompt"), _text(where, entry, "answer")
    return Row(_id(entry, number), question, answer=answer, where=where)


def targets_row(where: str, entry: dict[str, Any], number: int, field: str) -> Row:
    """A TruthfulQA row: question and {choices, labels} in ``field``."""
    question, targets = _text(where, entry, "question"), entry.get(field)
    if not isinstance(targets, dict):
        raise MlxSvdError(f'{where} has no object in "{field}"; give one with choices and labels')
    choices = _texts(where, targets.get("choices"), f'"choices" of "{field}"')
    labels = targets.get("labels")
    if not isinstance(labels, list) or not all(x in (0, 1) for x in labels):
        raise MlxSvdError(
            f'{where} has no list of 0 and 1 in "labels" of "{field}"; give 1 for each right choice'
        )
    if len(labels) != len(choices) or 1 not in labels:
        raise MlxSvdError(
            f'{where}: {len(labels)} "labels" with {sum(labels)} right ones for {len(choices)} '
            f'choices in "{field}"; give one label for each choice and at least one 1'
        )
    return Row(_id(entry, number), question, choices, labels.index(1), tuple(labels), where=where)


def digest(rows: list[Row]) -> str:
    """SHA-256 of what the rows say, wherever they are from."""
    text = json.dumps([row.content() for row in rows], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _id(entry: dict[str, Any], number: int) -> str:
    given = entry.get("id")
    return str(number if given is None else given)


def _text(where: str, entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise MlxSvdError(f'{where} has no text in "{key}"; write one, or leave out the row')
    return value


def _texts(where: str, value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise MlxSvdError(f"{where} has no list of texts in {name}; give at least two")
    if not all(isinstance(x, str) and x.strip() for x in value):
        raise MlxSvdError(f"{where}: {name} holds something that is empty or no text; mend it")
    return tuple(value)
