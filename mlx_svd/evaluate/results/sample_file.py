"""One line of JSON for every item, written as items are done; a killed run goes on from there."""

import json
import os
from pathlib import Path
from typing import Any

from mlx_svd.checkpoint.disk import disk_errors, replace_file
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.jobs.job import Record

_REMEDY = "give another --output-dir, or remove this one"


def check_folder(folder: Path, model: str, dtype: str | None) -> None:
    """Raise MlxSvdError if the folder holds records of another model (its digest) or dtype: its
    results.json can name one only."""
    for path in sorted(folder.glob("conditions_*.json")):
        before = _read_conditions(path)
        if before.get("model") != model:
            raise MlxSvdError(f"{path}: is of another model; {_REMEDY}")
        if before.get("dtype") != dtype:
            changed = _values(before.get("dtype"), dtype)
            raise MlxSvdError(f"{path}: was begun with another dtype{changed}; {_REMEDY}")


def _read_conditions(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise MlxSvdError(f"{path}: cannot be read; {_REMEDY}") from error
    if not isinstance(found, dict):
        raise MlxSvdError(f"{path}: holds no conditions; {_REMEDY}")
    return found


class SampleFile:
    """``samples_TASK.jsonl`` and the conditions under which it was begun.

    records: doc_id -> record, of what an earlier run left. Raises MlxSvdError if that run had
    other conditions (naming them), or if a line but the last is damaged.
    """

    def __init__(self, folder: Path, task: str, conditions: dict[str, Any]):
        conditions = json.loads(json.dumps(conditions))  # as they will be read again
        self.path = folder / f"samples_{task}.jsonl"
        self._conditions = folder / f"conditions_{task}.json"
        self.records: dict[int, Record] = {}
        with disk_errors(folder, "--output-dir"):
            folder.mkdir(parents=True, exist_ok=True)
        if self._conditions.is_file():
            self._check(conditions)
            self._read()
        elif self.path.exists():
            raise MlxSvdError(
                f"{self.path}: was not begun by this version of mlx-svd evaluate; {_REMEDY}"
            )
        replace_file(self._conditions, json.dumps(conditions, indent=2).encode())

    def add(self, records: list[Record]) -> None:
        """Append records and hand them to the operating system."""
        with disk_errors(self.path.parent, "--output-dir"), open(self.path, "ab") as stream:
            stream.write("".join(_line(record) for record in records).encode())
            stream.flush()
            os.fsync(stream.fileno())
        self.records |= {record["doc_id"]: record for record in records}

    def finish(self) -> list[Record]:
        """Put the lines into the order of the documents; returns the records in that order."""
        ordered = [self.records[doc_id] for doc_id in sorted(self.records)]
        replace_file(self.path, "".join(_line(record) for record in ordered).encode())
        return ordered

    def _check(self, conditions: dict[str, Any]) -> None:
        before = _read_conditions(self._conditions)
        keys = before.keys() | conditions.keys()
        changed = sorted(k for k in keys if before.get(k) != conditions.get(k))
        if changed:
            key = changed[0]
            raise MlxSvdError(
                f"{self._conditions}: was begun with another {key}"
                f"{_values(before.get(key), conditions.get(key))}; {_REMEDY}"
            )

    def _read(self) -> None:
        lines = self.path.read_bytes().split(b"\n") if self.path.is_file() else []
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                record = json.loads(line)
                self.records[record["doc_id"]] = record
            except (ValueError, TypeError, KeyError) as error:
                # The last line of a killed run may be torn; no other one can be.
                if number == len(lines):
                    break
                raise MlxSvdError(f"{self.path}: line {number} is damaged; {_REMEDY}") from error
        if lines and lines[-1]:
            # Complete or not, a line without its end must not be continued by the next one.
            text = "".join(_line(record) for record in self.records.values())
            replace_file(self.path, text.encode())


def _values(before: Any, now: Any) -> str:
    """Both values, unless they are digests, which tell nobody anything."""
    if any(isinstance(value, str) and len(value) == 64 for value in (before, now)):
        return ""
    return f" ({before!r}, now {now!r})"


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
