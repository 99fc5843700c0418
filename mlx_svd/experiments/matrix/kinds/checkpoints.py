"""Kind ``checkpoints``: real checkpoints, written, counted on disk, loaded and measured.

settings: model, measures, calibration, ``speed`` {prompt, tokens}. A condition: ``model``, and
``recipe`` (as a recipe file) for a compressed one. A recipe's ``target_size: {bytes_of: MODEL}`` is
the size of another model's tensors.
"""

import tempfile
from pathlib import Path
from typing import Any

from mlx_svd.checkpoint.loader import load, tensor_bytes
from mlx_svd.compress import compress
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.encode import tokens_of
from mlx_svd.evaluate.likelihood.forward import written_out
from mlx_svd.evaluate.speed import measure_speed
from mlx_svd.experiments.matrix import measures
from mlx_svd.experiments.matrix.calibrations import drawn_calibration
from mlx_svd.experiments.matrix.material import digests
from mlx_svd.experiments.matrix.measures import Measures
from mlx_svd.experiments.matrix.places import Places, check_keys, digest_of_model
from mlx_svd.experiments.matrix.record import Measured
from mlx_svd.plan.make import make_plan
from mlx_svd.plan.recipe import Recipe
from mlx_svd.plan.recipe_file import recipe_fields
from mlx_svd.source.source import open_source

_SETTINGS = {"model", "calibration", "speed", *measures.KEYS} - {"kl"}
_CONDITION = {"model", "recipe"}
_SPEED_KEYS = {"prompt", "tokens"}
_TOKENIZER_SAMPLE = "The capital of Zimbabwe (1,234) is not a colour; wasn't it \u00e9t\u00e9?\n"


class Checkpoints:
    """See the module; made before anything is loaded."""

    def __init__(self, settings: dict[str, Any], places: Places):
        check_keys("settings", settings, _SETTINGS)
        check_keys("speed", settings.get("speed", {}), _SPEED_KEYS)
        measures.check_measures(settings, places)
        self.settings, self.places = settings, places
        self._tokens: list[int] | None = None

    def check(self, condition: dict[str, Any]) -> None:
        """Raise MlxSvdError for settings that make no sense."""
        check_keys("a condition", condition, _CONDITION)
        if not (condition.get("model") or self.settings.get("model")):
            raise MlxSvdError("names no model; give one in the settings or in the condition")
        if condition.get("recipe"):
            self._recipe(condition)

    def seeded(self, condition: dict[str, Any]) -> bool:
        """A recipe that needs a calibration depends on the text that the seed draws."""
        return bool(condition.get("recipe") and self._recipe(condition).moments)

    def inputs(self, condition: dict[str, Any]) -> Any:
        """Digests of models, texts, facts and rows."""
        found = digests(self.settings, self.places)
        found |= measures.task_digests(self.settings, self.places)
        found["model"] = digest_of_model(self._name(condition))
        size = (condition.get("recipe") or {}).get("target_size")
        if isinstance(size, dict):
            found["bytes_of"] = digest_of_model(self.places.model_name(size["bytes_of"]))
        return found

    def run(self, condition: dict[str, Any], seed: int) -> Measured:
        """Compress into a temporary folder if asked to, then measure what lies there."""
        source = open_source(self._name(condition))
        if not condition.get("recipe"):
            return self._measure(source.folder, source.config)
        recipe = self._recipe(condition)
        calibration = None
        if recipe.moments:
            _, tokenizer = load(source.folder, lazy=True)
            entry = self.settings.get("calibration")
            calibration = drawn_calibration(
                source, tokenizer, entry, self.places, seed, recipe.moments
            )
        plan = make_plan(source, recipe, calibration=calibration)
        with tempfile.TemporaryDirectory() as folder:
            made = compress(source, plan, Path(folder) / "made", calibration=calibration)
            measured = self._measure(made, source.config)
        measured.details["forms"] = [
            [p.path, p.form, list(p.ranks or ()), p.quantization.bits if p.quantization else 16]
            for p in plan.projections
        ]
        measured.notes += plan.notes
        return measured

    def group(self, condition: dict[str, Any], seed: int | None) -> str | None:
        """Recipes that share a calibration, in whose folder plans keep their candidates."""
        return f"{self._name(condition)} {seed}" if self.seeded(condition) else None

    def _measure(self, folder: Path, config: dict) -> Measured:
        model, tokenizer = load(folder, dtype="float32")
        self._same_tokens(tokenizer)
        made = Measures(self.settings, self.places, tokenizer, config)
        speed = {}
        if entry := self.settings.get("speed"):
            prompt = next(iter(made.texts.values())).tokens[0][: entry.get("prompt", 128)]
            found = measure_speed(
                model, tokenizer, prompt.tolist(), max_tokens=entry.get("tokens", 64)
            )
            speed = {"prefill_tps": found.prefill_tps, "decode_tps": found.decode_tps}
        measured = made.measure(written_out(model))
        measured.numbers |= speed | {"bytes": float(sum(tensor_bytes(folder).values()))}
        return measured

    def _same_tokens(self, tokenizer: Any) -> None:
        """Losses by token compare only where texts are the same tokens."""
        found = tokens_of(tokenizer, _TOKENIZER_SAMPLE)
        if self._tokens is not None and found != self._tokens:
            raise MlxSvdError(
                "the models of this experiment tokenize differently, so their perplexities are of "
                "different things; compare models of one tokenizer"
            )
        self._tokens = found

    def _recipe(self, condition: dict[str, Any]) -> Recipe:
        content = dict(condition["recipe"])
        size = content.get("target_size")
        if isinstance(size, dict):
            check_keys("target_size", size, {"bytes_of"})
            folder = open_source(self.places.model_name(size["bytes_of"])).folder
            content["target_size"] = sum(tensor_bytes(folder).values())
        return Recipe(**recipe_fields(content))

    def _name(self, condition: dict[str, Any]) -> str:
        return self.places.model_name(condition.get("model") or self.settings["model"])
