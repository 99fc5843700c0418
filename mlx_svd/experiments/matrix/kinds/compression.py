"""Kind ``compression``: steps on a loaded model, nothing written.

settings: model, measures (``texts``, ``facts``, ...), calibration, importance, training. A
condition: ``steps``, and ``model`` or ``train`` in place of the settings' model.
"""

import json
from collections import OrderedDict
from typing import Any

import mlx.core as mx

from mlx_svd.analyze.subject import Subject
from mlx_svd.checkpoint.loader import load
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.divergence import BaseDistribution, base_distribution
from mlx_svd.experiments.matrix import measures
from mlx_svd.experiments.matrix.ledger import byte_numbers, parameters_of
from mlx_svd.experiments.matrix.material import digests
from mlx_svd.experiments.matrix.measures import Measures
from mlx_svd.experiments.matrix.places import Places, check_keys, digest_of_model
from mlx_svd.experiments.matrix.record import Measured
from mlx_svd.experiments.matrix.steps import (
    applied,
    check_steps,
    relative_change,
    run_steps,
    steps_are_seeded,
)
from mlx_svd.experiments.matrix.training.train import Training, wanted_parameters
from mlx_svd.experiments.matrix.workbench import Workbench
from mlx_svd.source.source import open_source

_SETTINGS = {"model", "calibration", "importance", "training", *measures.KEYS}
_CONDITION = {"model", "train", "steps"}
_IMPORTANCE_KEYS = {"prompts", "window"}
_MODELS = 2


class Compression:
    """See the module; made before anything is loaded."""

    def __init__(self, settings: dict[str, Any], places: Places):
        check_keys("settings", settings, _SETTINGS)
        check_keys("importance", settings.get("importance", {}), _IMPORTANCE_KEYS)
        measures.check_measures(settings, places)
        self.settings, self.places = settings, places
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()

    def check(self, condition: dict[str, Any]) -> None:
        """Raise MlxSvdError for settings that make no sense."""
        check_keys("a condition", condition, _CONDITION)
        check_steps(_resolved(condition.get("steps", [])))
        if "train" in condition:
            self._training().check(condition["train"])
        elif not (condition.get("model") or self.settings.get("model")):
            raise MlxSvdError("names no model; give one in the settings or in the condition")

    def seeded(self, condition: dict[str, Any]) -> bool:
        """Training always is; see ``steps_are_seeded``."""
        return "train" in condition or steps_are_seeded(condition.get("steps", []))

    def inputs(self, condition: dict[str, Any]) -> Any:
        """Digests of model, texts, facts and rows."""
        found = digests(self.settings, self.places)
        found |= measures.task_digests(self.settings, self.places)
        if "train" not in condition:
            found["model"] = digest_of_model(self._name(condition))
        return found

    def run(self, condition: dict[str, Any], seed: int) -> Measured:
        """Load (or train) the model, run the steps, measure."""
        numbers = {}
        if "train" in condition:
            trained = self._training().model(condition["train"], seed)
            name, numbers = str(trained.folder), dict(trained.numbers)
        else:
            name = self._name(condition)
        loaded = self._open(name)
        changed = run_steps(loaded.bench, _resolved(condition.get("steps", [])), seed)
        with applied(loaded.bench, changed) as model:
            measured = loaded.measures.measure(model, loaded.base)
        measured.numbers |= numbers | byte_numbers(loaded.bench, changed)
        measured.numbers["relative_change"] = relative_change(loaded.bench, changed)
        measured.details["ranks"] = changed.ranks
        if "parameters" in condition.get("train", {}):
            # Trained as factors; the folder holds their products.
            measured.numbers["bytes"] = numbers["parameters"] * mx.float32.size
        if changed.ranks:
            measured.numbers["parameters"] = parameters_of(loaded.bench, changed)
        return measured

    def group(self, condition: dict[str, Any], seed: int | None) -> str | None:
        """Runs of one trained model, which the first of them trains."""
        if "train" not in condition:
            return None
        return json.dumps([condition["train"], seed], sort_keys=True)

    def _training(self) -> Training:
        if "training" not in self.settings:
            raise MlxSvdError("train: give training: {text, facts, ...} in the settings")
        return Training(self.settings["training"], self.places)

    def _name(self, condition: dict[str, Any]) -> str:
        given = self.places.model or condition.get("model") or self.settings["model"]
        return self.places.model_name(given)

    def _open(self, name: str) -> "_Loaded":
        if name not in self._loaded:
            self._loaded[name] = _Loaded(name, self.settings, self.places)
            while len(self._loaded) > _MODELS:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(name)
        return self._loaded[name]


def _resolved(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``parameters`` of a size {dim, layers, heads} as a number."""
    found = []
    for step in steps:
        name, options = next(iter(step.items()))
        if isinstance(options, dict) and isinstance(options.get("parameters"), dict):
            step = {name: options | {"parameters": wanted_parameters(options["parameters"])}}
        found.append(step)
    return found


class _Loaded:
    """One model with its measures; kept for the runs that follow."""

    def __init__(self, name: str, settings: dict[str, Any], places: Places):
        source = open_source(name)
        model, tokenizer = load(source.folder, dtype="float32")
        self.measures = Measures(settings, places, tokenizer, source.config)
        windows = next(iter(self.measures.texts.values()), None)
        subject = Subject(source, model, tokenizer, windows, "float32")
        self.bench = Workbench(subject, self.measures.facts, settings, places)
        self.base: BaseDistribution | None = None
        if settings.get("kl") and windows is not None:
            self.base = base_distribution(model, windows.tokens)
