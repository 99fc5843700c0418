"""Method x budget x bits from one calibration, and mlx-lm's own quantizers: one table.

Every row is a JSON record in ``OUTPUT/rows``, written when it is complete; a sweep that was
stopped goes on with the rows that are missing.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_svd import __version__
from mlx_svd.calibrate.calibrate import calibrate
from mlx_svd.calibrate.statistics import MOMENTS, Calibration
from mlx_svd.calibrate.text import Windows, read_windows
from mlx_svd.checkpoint.disk import disk_errors, replace_file
from mlx_svd.checkpoint.loader import load, load_model
from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.cost import plan_cost
from mlx_svd.experiments.measure import Measurement, read_material
from mlx_svd.experiments.methods import slug
from mlx_svd.experiments.sweep_config import SweepConfig
from mlx_svd.experiments.sweep_rows import Row, Rows, record_file
from mlx_svd.source.families import PROJECTIONS
from mlx_svd.source.source import Source, open_source


def sweep(
    model: str,
    config: SweepConfig,
    output: Path,
    data_dir: Path,
    advance: Callable[[str, int, int], None] = lambda row, done, rows: None,
) -> list[dict[str, Any]]:
    """Run every row of ``config`` on ``model``; returns the records, the dense model's first.

    output: folder of rows and of the calibration; data_dir: what the config's paths start from.
    ``advance`` is told each row's name before it runs, and how many are done of how many. A row
    that cannot be made (a budget out of reach, a rival that does not run) has a ``reason`` in
    place of numbers. Raises MlxSvdError for bad input.
    """
    return list(_Sweep(model, config, output, data_dir).run(advance))


class _Sweep:
    def __init__(self, model: str, config: SweepConfig, output: Path, data_dir: Path):
        self.config, self.output = config, output
        self.source: Source = open_source(model)
        self.folder = self.source.folder
        _, tokenizer = load(self.folder, lazy=True)
        vocab = self.source.config["vocab_size"]
        self.text_path = data_dir / config.calibration["text"]
        self.windows: Windows = read_windows(
            tokenizer,
            self.text_path,
            count=config.calibration.get("windows", 96),
            length=config.calibration.get("length", 512),
            vocab_size=vocab,
        )
        self.material = read_material(tokenizer, config.material, data_dir, vocab)
        present = {p.name for m in self.source.linears for p in m.projections}
        with disk_errors(output, "--output"):
            (output / "rows").mkdir(parents=True, exist_ok=True)
        self.calibration: Calibration = calibrate(
            self.source,
            self._open_model,
            self.windows,
            output / "calibration",
            projections=tuple(p for p in PROJECTIONS if p in present),
            moments=MOMENTS,
        )

    def _open_model(self):
        return load_model(self.folder, dtype="float32", lazy=True)[0]

    def run(self, advance: Callable[[str, int, int], None]) -> Iterator[dict[str, Any]]:
        if not (cost := self.output / "plan.json").is_file():
            self._save(cost, plan_cost(self.folder, self.output / "calibration"))
        rows = list(
            Rows(
                self.config,
                self.source,
                self._open_model,
                self.calibration,
                self.windows,
                self.text_path,
                self.output / "rows",
            )
        )
        done = [self._finished(row) for row in rows]
        measurement = None
        if not all(done) or not self._dense_file().is_file():
            measurement = Measurement(self.folder, self.material)
            self._save(self._dense_file(), self._dense_record(measurement))
        yield json.loads(self._dense_file().read_bytes()) | {"plan": json.loads(cost.read_bytes())}
        for number, (row, record) in enumerate(zip(rows, done, strict=True)):
            advance(row.name, number, len(rows))
            yield record or self._make(row, measurement)
        shutil.rmtree(self.output / "checkpoints", ignore_errors=True)

    # -- records --------------------------------------------------------------------------

    def _file(self, name: str) -> Path:
        return record_file(self.output / "rows", name)

    def _dense_file(self) -> Path:
        return self.output / "dense.json"

    def _key(self, row: Row) -> str:
        conditions = [__version__, self.calibration.info.digest, self.material.record()]
        text = json.dumps([conditions, row.name, row.key], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _finished(self, row: Row) -> dict[str, Any] | None:
        path = self._file(row.name)
        record = json.loads(path.read_bytes()) if path.is_file() else {}
        return record if record.get("key") == self._key(row) else None

    def _make(self, row: Row, measurement: Measurement) -> dict[str, Any]:
        folder = self.output / "checkpoints" / slug(row.name)
        for left in (self.output / "checkpoints").glob(slug(row.name) + "*"):
            shutil.rmtree(left)
        record: dict[str, Any] = {"name": row.name, "group": row.group, "key": self._key(row)}
        try:
            record |= row.make(folder)
        except MlxSvdError as error:
            record["reason"] = str(error)
        else:
            record |= measurement.measure(folder)
            shutil.rmtree(folder)
        self._save(self._file(row.name), record)
        return record

    def _dense_record(self, measurement: Measurement) -> dict[str, Any]:
        info = self.calibration.info
        return {
            "name": "dense",
            "group": "",
            "model": self.source.name,
            "revision": self.source.revision,
            "version": __version__,
            "total_bytes": sum(h.nbytes for h in self.source.headers.values()),
            "material": self.material.record(),
            "calibration": {
                "digest": info.digest,
                "origin": info.origin,
                "windows": info.windows,
                "tokens": info.tokens,
                "seconds": info.seconds,
                "cpu_seconds": info.cpu_seconds,
                "peak_memory": info.peak_memory,
            },
            **measurement.dense,
        }

    def _save(self, path: Path, record: dict[str, Any]) -> None:
        replace_file(path, json.dumps(record, indent=2).encode())
