"""Kind ``protection``: fine-tune on false facts with some protection, measure what is kept.

settings: model, ``facts`` {file, limit, paraphrases: {relation: templates}}, ``text`` {file},
``conflict`` (how many known facts are trained to be false, drawn by the seed), ``train`` (fields of
``ProtectSettings``), ``uptakes`` (levels at which arms are compared), ``generation`` {prompts,
tokens}, ``quantize`` {name: options of a quantize step}. A condition: ``arm``, a name or {base:
name, field: value}, or "base" for the model before training; ``train``: what differs from the
settings'.
"""

import tempfile
from collections import OrderedDict
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_svd.checkpoint.loader import load
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.generation.prompts import read_prompts
from mlx_svd.evaluate.generation.quality import GREEDY, GenerationSettings, generation_quality
from mlx_svd.evaluate.likelihood.forward import written_out
from mlx_svd.evaluate.perplexity import window_losses
from mlx_svd.evaluate.retention import (
    Outcomes,
    Probe,
    check_templates,
    read_probes,
    with_paraphrases,
)
from mlx_svd.experiments.matrix.kinds.knowledge import add_knowledge, add_trajectory
from mlx_svd.experiments.matrix.material import digests
from mlx_svd.experiments.matrix.measures import add_generation
from mlx_svd.experiments.matrix.places import Places, check_keys, digest_of_model
from mlx_svd.experiments.matrix.quantizers import Quantizer, quantize_model
from mlx_svd.experiments.matrix.record import EXP, Measured, metric_of
from mlx_svd.finetune.protection import (
    Arm,
    Baseline,
    ProtectSettings,
    arm_named,
    make_baseline,
    protect,
)

BASE = "base"
_SETTINGS = {
    "model", "facts", "text", "conflict", "train", "uptakes", "generation", "quantize",
}  # fmt: skip
_CONDITION = {"arm", "train"}
_BASELINES = 8
# Of ProtectSettings: what a condition cannot change, because arms would not be paired, or because
# it is measured here.
_FIXED = {"arm", "seed", "prompts", "max_tokens", "text_windows", "text_length", "facts_limit"}


class Protection:
    """See the module; made before anything is loaded."""

    def __init__(self, settings: dict[str, Any], places: Places):
        check_keys("settings", settings, _SETTINGS)
        for name in ("model", "facts", "text", "conflict"):
            if name not in settings:
                raise MlxSvdError(f"settings: give {name}")
        check_keys("facts", settings["facts"], {"file", "limit", "paraphrases"})
        if "paraphrases" in settings["facts"]:
            check_templates(settings["facts"]["paraphrases"], "settings: facts: paraphrases")
        check_keys("text", settings["text"], {"file", "windows", "length"})
        check_keys("generation", settings.get("generation", {}), {"prompts", "tokens"})
        self.quantizers = {
            name: Quantizer(**options) for name, options in settings.get("quantize", {}).items()
        }
        self.settings, self.places = settings, places
        self._baselines: OrderedDict[str, Baseline] = OrderedDict()

    def check(self, condition: dict[str, Any]) -> None:
        """Raise MlxSvdError for settings that make no sense."""
        check_keys("a condition", condition, _CONDITION)
        if "arm" not in condition:
            raise MlxSvdError("a condition needs an arm")
        if condition["arm"] != BASE:
            self._protect_settings(condition, 0)

    def seeded(self, condition: dict[str, Any]) -> bool:
        """Always: the facts that are trained falsely are drawn."""
        return True

    def group(self, condition: dict[str, Any], seed: int | None) -> None:
        """Every run stands alone; what a seed's runs share is measured once in a process."""

    def inputs(self, condition: dict[str, Any]) -> Any:
        """Digests of model, facts and text."""
        return digests(self.settings, self.places) | {"model": digest_of_model(self._model())}

    def run(self, condition: dict[str, Any], seed: int) -> Measured:
        """Train one arm from the seed's baseline and measure it, unquantized and quantized."""
        baseline = self._baseline(condition, seed)
        measured = Measured({})
        if condition["arm"] == BASE:
            model = baseline.open("float32")
            self._measure(model, baseline, baseline.test.base, measured)
            return measured
        settings = self._protect_settings(condition, seed)
        with tempfile.TemporaryDirectory() as folder:
            result = protect(baseline, Path(folder) / "made", settings)
            model = written_out(load(Path(folder) / "made", dtype="float32")[0])
        add_trajectory(result, self.settings.get("uptakes", ()), measured)
        self._measure(model, baseline, result.outcomes, measured)
        return measured

    def _measure(
        self, model: nn.Module, baseline: Baseline, outcomes: Outcomes, measured: Measured
    ) -> None:
        """The model as it is, then under each quantizer; "NAME METRIC" is quantized."""
        add_knowledge(baseline.test, outcomes, measured)
        self._quality(model, baseline, measured)
        for name, quantizer in self.quantizers.items():
            found = Measured({})
            with quantize_model(model, quantizer) as quantized:
                asked = baseline.test.ask(quantized, write=True)
                add_knowledge(baseline.test, asked, found)
                self._quality(quantized, baseline, found)
            measured.metrics |= {f"{name} {m}": metric for m, metric in found.metrics.items()}
            measured.numbers |= {f"{name} {n}": value for n, value in found.numbers.items()}

    def _quality(self, model: nn.Module, baseline: Baseline, measured: Measured) -> None:
        windows = baseline.data.held_out
        losses = window_losses(model, windows)
        items = [f"window {i}" for i in range(len(windows))]
        measured.metrics["perplexity"] = metric_of(
            items, losses.sums, losses.counts, scale=EXP, better=False
        )
        if entry := self.settings.get("generation"):
            chosen = GenerationSettings(modes=(GREEDY,), max_tokens=entry.get("tokens", 80))
            prompts = read_prompts(None, self.places.limited(entry.get("prompts", 32)))
            found = generation_quality(model, baseline.tokenizer, prompts, chosen)
            add_generation(found.records, found.summary, measured)

    def _baseline(self, condition: dict[str, Any], seed: int) -> Baseline:
        settings = ProtectSettings(seed=seed, **self._fixed(), **self._shared(condition))
        key = str((seed, settings.scoring, settings.tokens, settings.dtype))
        if key not in self._baselines:
            self._baselines[key] = make_baseline(
                self._model(),
                self._probes(),
                int(self.settings["conflict"]),
                settings,
                text=self.places.file(self.settings["text"]["file"]),
            )
            while len(self._baselines) > _BASELINES:
                self._baselines.popitem(last=False)
        return self._baselines[key]

    def _probes(self) -> list[Probe]:
        entry = self.settings["facts"]
        return with_paraphrases(
            read_probes(self.places.file(entry["file"]), 0), entry.get("paraphrases", {})
        )

    def _shared(self, condition: dict[str, Any]) -> dict[str, Any]:
        """What of the training settings the baseline depends on."""
        given = {**self.settings.get("train", {}), **condition.get("train", {})}
        return {k: given[k] for k in ("scoring", "tokens", "dtype") if k in given}

    def _fixed(self) -> dict[str, Any]:
        """Settings that all arms share. Texts are generated here, item by item."""
        text = self.settings["text"]
        return {
            "prompts": 0,
            "text_windows": max(2, self.places.limited(text.get("windows", 64))),
            "text_length": text.get("length", 128),
            "facts_limit": self.places.limited(self.settings["facts"].get("limit")),
        }

    def _protect_settings(self, condition: dict[str, Any], seed: int) -> ProtectSettings:
        given = {**self.settings.get("train", {}), **condition.get("train", {})}
        if "steps" in condition.get("train", {}):
            given.pop("epochs", None)
        if "epochs" in condition.get("train", {}):
            given.pop("steps", None)
        check_keys("train", given, {f.name for f in fields(ProtectSettings)} - _FIXED)
        return ProtectSettings(arm=arm_of(condition["arm"]), seed=seed, **self._fixed(), **given)

    def _model(self) -> str:
        return self.places.model_name(self.places.model or self.settings["model"])


def arm_of(given: str | dict[str, Any]) -> Arm:
    """An arm by its name, or one changed: {base: name, field: value}."""
    if isinstance(given, str):
        return arm_named(given)
    changes = {k: v for k, v in given.items() if k != "base"}
    check_keys("arm", changes, {f.name for f in fields(Arm)})
    for key in ("projections", "adapter_projections"):
        if isinstance(changes.get(key), str):
            changes[key] = tuple(changes[key].split(","))
    return replace(arm_named(given.get("base", "none")), **changes)
