"""Method x budget x bits from one calibration, and mlx-lm's own quantizers: one table.

Every row is a JSON record in ``OUTPUT/rows``, written when it is complete; a sweep that was
stopped goes on with the rows that are missing.
"""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_svd import __version__
from mlx_svd.calibrate.calibrate import calibrate
from mlx_svd.calibrate.statistics import MOMENTS, Calibration
from mlx_svd.calibrate.text import Windows, read_windows
from mlx_svd.checkpoint.disk import disk_errors, replace_file
from mlx_svd.checkpoint.loader import load, load_model
from mlx_svd.compress import compress
from mlx_svd.compress.sequential import calibrate_sequentially
from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.cost import plan_cost
from mlx_svd.experiments.measure import Measurement, read_material
from mlx_svd.experiments.methods import method_recipe, slug
from mlx_svd.experiments.rivals import make_rival
from mlx_svd.experiments.sweep_config import HEALED, SEQUENTIAL, SweepConfig
from mlx_svd.finetune.heal import heal
from mlx_svd.finetune.settings import HealSettings
from mlx_svd.plan.budget import Budget
from mlx_svd.plan.choices import Choices
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.plan import Plan
from mlx_svd.plan.recipe import Recipe
from mlx_svd.source.families import PROJECTIONS
from mlx_svd.source.source import Source, open_source


@dataclass(frozen=True)
class _Row:
    """name: unique; group: rows that are compared; make: writes the checkpoint into a new folder
    and returns what else is to be recorded; key: identifies it besides the sweep's conditions."""

    name: str
    group: str
    make: Callable[[Path], dict[str, Any]]
    key: Any


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
        rows = list(self._rows())
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

    # -- rows -----------------------------------------------------------------------------

    def _rows(self) -> Iterator[_Row]:
        for group in self.config.groups:
            for keep in group.keep_bytes:
                for method in group.methods:
                    yield self._method_row(group, keep, method)
        for name in self.config.rivals:
            yield self._rival_row(name)
            if name in self.config.matched:
                yield self._matched_row(name, heals=False)
                if self.config.heal:
                    yield self._matched_row(name, heals=True)

    def _method_row(self, group, keep: float, method: str) -> _Row:
        heals, again = method.endswith(HEALED), SEQUENTIAL in method
        base = method.removesuffix(HEALED).removesuffix(SEQUENTIAL)

        def make(folder: Path) -> dict[str, Any]:
            recipe = method_recipe(base, self.source, group.projections, keep, group.bits)
            return self._compress(recipe, folder, heals, again)

        name = f"{group.name} {keep:g} {method}"
        key = [group.projections, group.bits, self.config.heal if heals else None]
        return _Row(name, f"{group.name} {keep:g}", make, key)

    def _rival_row(self, name: str) -> _Row:
        def make(folder: Path) -> dict[str, Any]:
            made = make_rival(name, self.folder, folder, self.windows)
            if made.reason:
                raise MlxSvdError(made.reason)
            return {
                "total_bytes": made.nbytes,
                "bits_per_weight": made.bits_per_weight,
                "seconds": made.seconds,
                "cpu_seconds": made.cpu_seconds,
                "command": made.command,
                "settings": made.settings,
            }

        return _Row(f"mlx-lm {name}", f"at {name}'s bytes", make, name)

    def _matched_row(self, rival: str, heals: bool) -> _Row:
        """Our budget at the bytes of a rival."""

        def make(folder: Path) -> dict[str, Any]:
            record = json.loads(self._file(f"mlx-lm {rival}").read_bytes())
            if "total_bytes" not in record:
                raise MlxSvdError(f"{rival} did not run, so there is no size to match")
            recipe = Recipe(
                PROJECTIONS,
                scorer="two-sided",
                budget=Budget(target_size=record["total_bytes"]),
                choices=Choices(),
            )
            return self._compress(recipe, folder, heals)

        name = f"budget at {rival}'s bytes" + (" healed" if heals else "")
        return _Row(name, f"at {rival}'s bytes", make, self.config.heal if heals else None)

    def _compress(
        self, recipe: Recipe, folder: Path, heals: bool, again: bool = False
    ) -> dict[str, Any]:
        """again: with a sequential calibration."""
        began, cpu = time.perf_counter(), time.process_time()
        calibration = self.calibration if recipe.moments else None
        plan = make_plan(self.source, recipe, calibration=calibration)
        planned, planned_cpu = time.perf_counter(), time.process_time()
        if again:
            place = folder.with_name(folder.name + ".calibration")
            plan, calibration = calibrate_sequentially(
                self.source, self._open_model, plan, calibration, place
            )
        made = folder.with_name(folder.name + ".before") if heals else folder
        compress(self.source, plan, made, calibration=calibration)
        record = _plan_record(plan, recipe) | {
            "plan_seconds": planned - began,
            "plan_cpu_seconds": planned_cpu - cpu,
        }
        if heals:
            settings = HealSettings(**self.config.heal)
            healed = heal(made, self.folder, folder, settings, text=self.text_path)
            shutil.rmtree(made)
            record["healed"] = {
                "kl_before": healed.kl_before,
                "kl_after": healed.kl_after,
                "steps": healed.steps,
                "best_step": healed.best_step,
            }
        return record | {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
        }

    # -- records --------------------------------------------------------------------------

    def _file(self, name: str) -> Path:
        return self.output / "rows" / f"{slug(name)}.json"

    def _dense_file(self) -> Path:
        return self.output / "dense.json"

    def _key(self, row: _Row) -> str:
        conditions = [__version__, self.calibration.info.digest, self.material.record()]
        text = json.dumps([conditions, row.name, row.key], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _finished(self, row: _Row) -> dict[str, Any] | None:
        path = self._file(row.name)
        record = json.loads(path.read_bytes()) if path.is_file() else {}
        return record if record.get("key") == self._key(row) else None

    def _make(self, row: _Row, measurement: Measurement) -> dict[str, Any]:
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


def _plan_record(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    touched = [p for p in plan.projections if p.projection.name in recipe.projections]
    forms = Counter(f"{p.form} {p.quantization.bits if p.quantization else 16}" for p in touched)
    losses = [p.loss for p in touched if p.loss is not None]
    return {
        "total_bytes": plan.bytes_after,
        "touched_bytes": sum(p.bytes_after for p in touched),
        "touched_before": sum(p.bytes_before for p in touched),
        "forms": dict(sorted(forms.items())),
        "expected_loss": sum(losses) if losses and recipe.scorer == "two-sided" else None,
        "notes": list(plan.notes),
    }
