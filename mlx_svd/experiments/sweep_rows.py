"""The rows of a sweep: how the checkpoint of each is made."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_svd.calibrate.statistics import Calibration
from mlx_svd.calibrate.text import Windows
from mlx_svd.compress import compress
from mlx_svd.compress.sequential import calibrate_sequentially
from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.methods import method_recipe, slug
from mlx_svd.experiments.rivals import make_rival
from mlx_svd.experiments.sweep_config import HEALED, SEQUENTIAL, Group, SweepConfig
from mlx_svd.finetune.heal import heal
from mlx_svd.finetune.settings import HealSettings
from mlx_svd.plan.budget import Budget
from mlx_svd.plan.choices import Choices
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.plan import Plan
from mlx_svd.plan.recipe import Recipe
from mlx_svd.source.families import PROJECTIONS
from mlx_svd.source.source import Source


@dataclass(frozen=True)
class Row:
    """name: unique; group: rows that are compared; make: writes the checkpoint into a new folder
    and returns what else is to be recorded; key: identifies it besides the sweep's conditions."""

    name: str
    group: str
    make: Callable[[Path], dict[str, Any]]
    key: Any


def record_file(folder: Path, name: str) -> Path:
    """The record of a row in the folder of rows."""
    return folder / f"{slug(name)}.json"


@dataclass(frozen=True)
class Rows:
    """source: the dense model; windows: the calibration text, for rivals; text: its file, for
    healing; folder: of finished rows, where the size of a rival is looked up."""

    config: SweepConfig
    source: Source
    open_model: Callable[[], nn.Module]
    calibration: Calibration
    windows: Windows
    text: Path
    folder: Path

    def __iter__(self) -> Iterator[Row]:
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
        for name, fields in self.config.recipes.items():
            yield self._recipe_row(name, fields)

    def _method_row(self, group: Group, keep: float, method: str) -> Row:
        heals, again = method.endswith(HEALED), SEQUENTIAL in method
        base = method.removesuffix(HEALED).removesuffix(SEQUENTIAL)

        def make(folder: Path) -> dict[str, Any]:
            recipe = method_recipe(base, self.source, group.projections, keep, group.bits)
            return self._compress(recipe, folder, heals, again)

        name = f"{group.name} {keep:g} {method}"
        key = [group.projections, group.bits, self.config.heal if heals else None]
        return Row(name, f"{group.name} {keep:g}", make, key)

    def _rival_row(self, name: str) -> Row:
        def make(folder: Path) -> dict[str, Any]:
            made = make_rival(name, self.source.folder, folder, self.windows)
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

        return Row(f"mlx-lm {name}", f"at {name}'s bytes", make, name)

    def _matched_row(self, rival: str, heals: bool) -> Row:
        """Our budget at the bytes of a rival."""

        def make(folder: Path) -> dict[str, Any]:
            record = json.loads(record_file(self.folder, f"mlx-lm {rival}").read_bytes())
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
        return Row(name, f"at {rival}'s bytes", make, self.config.heal if heals else None)

    def _recipe_row(self, name: str, fields: dict[str, Any]) -> Row:
        def make(folder: Path) -> dict[str, Any]:
            return self._compress(Recipe(**fields), folder, heals=False)

        return Row(f"recipe {name}", "recipes", make, fields)

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
                self.source, self.open_model, plan, calibration, place
            )
        made = folder.with_name(folder.name + ".before") if heals else folder
        compress(self.source, plan, made, calibration=calibration)
        record = _plan_record(plan, recipe) | {
            "plan_seconds": planned - began,
            "plan_cpu_seconds": planned_cpu - cpu,
        }
        if heals:
            settings = HealSettings(**self.config.heal)
            healed = heal(made, self.source.folder, folder, settings, text=self.text)
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
