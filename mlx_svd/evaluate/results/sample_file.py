"""One line of JSON for every item, written as items are done; a killed run goes on from there."""

import json
import os
from math import isfinite
from pathlib import Path
from typing import Any

from mlx_svd.checkpoint.disk import disk_errors, replace_file
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.jobs.job import Job, Record
from mlx_svd.evaluate.results.folder import REMEDY, read_conditions, values


class SampleFile:
    """``samples_TASK.jsonl`` and the conditions under which it was begun.

    records: doc_id -> record, of what an earlier run left in the folder, which exists. Raises
    MlxSvdError if that run had other conditions (naming them), or if a line but a torn last one is
    damaged: no JSON, of no document of the job, or without the job's ``fields``.
    """

    def __init__(self, folder: Path, job: Job, conditions: dict[str, Any]):
        conditions = json.loads(json.dumps(conditions))  # as they will be read again
        self.path = folder / f"samples_{job.task}.jsonl"
        self._conditions = folder / f"conditions_{job.task}.json"
        self._documents, self._fields = set(job.doc_ids), job.fields
        self.records: dict[int, Record] = {}
        if self._conditions.is_file():
            self._check(conditions)
            self._read()
        elif self.path.exists():
            raise MlxSvdError(
                f"{self.path}: was not begun by this version of mlx-svd evaluate; {REMEDY}"
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
        before = read_conditions(self._conditions)
        keys = before.keys() | conditions.keys()
        changed = sorted(k for k in keys if before.get(k) != conditions.get(k))
        if changed:
            key = changed[0]
            raise MlxSvdError(
                f"{self._conditions}: was begun with another {key}"
                f"{values(before.get(key), conditions.get(key))}; {REMEDY}"
            )

    def _read(self) -> None:
        lines = self.path.read_bytes().split(b"\n") if self.path.is_file() else []
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                record = json.loads(line)
            except ValueError:
                # The last line of a killed run may be torn; no other one can be.
                if number == len(lines):
                    break
                record = None
            if damage := self._damage(record):
                raise MlxSvdError(
                    f"{self.path}: line {number} {damage}; delete that line, and its "
                    "item is scored again"
                )
            self.records[record["doc_id"]] = record
        if lines and lines[-1]:
            # Complete or not, a line without its end must not be continued by the next one.
            text = "".join(_line(record) for record in self.records.values())
            replace_file(self.path, text.encode())

    def _damage(self, record: Any) -> str:
        """What is wrong with a line, "" if nothing is."""
        if not isinstance(record, dict):
            return "is damaged"
        number = record.get("doc_id")
        if type(number) is not int or number not in self._documents:
            return f"has the doc_id {number!r}, which is not of this run"
        for name, kind in self._fields.items():
            if name not in record:
                return f"lacks {name!r}"
            value = record[name]
            if not isinstance(value, kind) or (isinstance(value, float) and not isfinite(value)):
                return f"has {value!r} as {name!r}"
        return ""


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
