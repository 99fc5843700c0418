"""Train a tiny model by its specification, once for each seed; the result is a model folder.

A specification: ``dim``, ``layers``, ``heads``, and ``steps``, or ``flops_of`` {another
specification}: as many steps as that one's arithmetic allows. ``parameters`` (a number, or a size
{dim, layers, heads}): factors instead of matrices, from the first step on, or after the share
``factor_at`` of the steps, the rest of which trains the factors. ``teacher`` {another
specification}: its predictions are learned in place of the text's next bytes.
"""

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_svd import __version__
from mlx_svd.checkpoint.disk import disk_errors
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.matrix.locks import only_one
from mlx_svd.experiments.matrix.material import read_facts_of
from mlx_svd.experiments.matrix.places import Places, check_keys, file_digest
from mlx_svd.experiments.matrix.training.corpus import Corpus, make_corpus, write_tokenizer
from mlx_svd.experiments.matrix.training.descent import Descent
from mlx_svd.experiments.matrix.training.small_model import (
    Size,
    dense_weights,
    factorize,
    size_of,
)

_KEYS = {"text", "facts", "facts_share", "batch", "length", "lr", "keep_at"}
_SIZE_KEYS = ("dim", "layers", "heads")
_SPEC_KEYS = {*_SIZE_KEYS, "steps", "flops_of", "parameters", "factor_at", "teacher", "lr"}
_RECORD, _KEPT = "training.json", "kept.npz"
# Multiplications and additions of a weight for a token, forward and backward.
_FLOPS = 6


@dataclass(frozen=True)
class Trained:
    """folder: a model folder that every loader here takes; numbers: parameters (of the factors
    where it was trained as such), training_tokens, training_flops, training_loss (nats a byte, of
    the last tenth of the steps), training_seconds (of the steps that were taken here)."""

    folder: Path
    numbers: dict[str, float]


class Training:
    """settings: ``text`` {file}, ``facts`` {file, count}, ``facts_share``, ``batch`` rows of
    ``length`` bytes, ``lr`` of AdamW (warm-up, then cosine); ``keep_at``: matrices as they are
    after this share of the steps are kept, and factors with that ``factor_at`` begin from them
    instead of training the same matrices again."""

    def __init__(self, settings: dict[str, Any], places: Places):
        check_keys("training", settings, _KEYS)
        self.settings, self.places = settings, places
        self.batch, self.length = int(settings.get("batch", 16)), int(settings.get("length", 128))
        self.keep_at = float(settings.get("keep_at", 0))
        # The training's loss is that of the last tenth.
        if not 0 <= self.keep_at <= 0.9:
            raise MlxSvdError(f"training: keep_at {self.keep_at}: give a share up to 0.9")

    @cached_property
    def corpus(self) -> Corpus:
        """Text and sentences."""
        facts = ()
        if "facts" in self.settings:
            unlimited = Places(self.places.data_dir, self.places.shared)
            facts = read_facts_of(self.settings["facts"], unlimited).every
        share = float(self.settings.get("facts_share", 0.5 if facts else 0.0))
        return make_corpus(
            self.places.file(self.settings["text"]["file"]), facts, share, self.length
        )

    def check(self, spec: dict[str, Any]) -> None:
        """Raise MlxSvdError for a specification that makes no sense."""
        check_keys("train", spec, _SPEC_KEYS)
        size = _size(spec)
        if ("steps" in spec) == ("flops_of" in spec):
            raise MlxSvdError("train: give steps or flops_of")
        if self.steps(spec) < 1:
            raise MlxSvdError(f"train: {self.steps(spec)} steps; must be at least 1")
        for other in ("teacher", "flops_of"):
            if other in spec:
                self.check(spec[other])
        if not 0 < self.rate(spec) < float("inf"):
            raise MlxSvdError(
                f"train: lr {spec.get('lr', self.settings.get('lr'))}: must be above 0"
            )
        if "factor_at" in spec and "parameters" not in spec:
            raise MlxSvdError("train: factor_at goes with parameters")
        if not 0 <= float(spec.get("factor_at", 0)) < 1:
            raise MlxSvdError(f"train: factor_at {spec['factor_at']}: give a share below 1")
        if "parameters" in spec and wanted_parameters(spec["parameters"]) > size.parameters:
            raise MlxSvdError(
                f"train: {wanted_parameters(spec['parameters']):,} parameters, more than the dense "
                f"model's {size.parameters:,}"
            )

    def steps(self, spec: dict[str, Any]) -> int:
        """Optimizer steps of a specification."""
        if "flops_of" not in spec:
            return int(spec["steps"])
        other = spec["flops_of"]
        there, here = (_size(s).parameters for s in (other, spec))
        return max(1, round(self.steps(other) * there / here))

    def rate(self, spec: dict[str, Any]) -> float:
        """Largest learning rate of a specification, its own or the settings'."""
        return float(spec.get("lr", self.settings.get("lr", 2e-3)))

    def model(self, spec: dict[str, Any], seed: int) -> Trained:
        """The trained model; made by the first process that asks, kept in the shared folder. Raises
        MlxSvdError if the loss is not a number."""
        inputs = [file_digest(self.places.file(self.settings["text"]["file"]))]
        if "facts" in self.settings:
            inputs.append(file_digest(self.places.file(self.settings["facts"]["file"])))
        settings = {key: value for key, value in self.settings.items() if key != "lr"}
        key = [__version__, settings, inputs, self._with_rates(spec), seed]
        content = json.dumps(key, sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        folder = self.places.shared / "models" / f"dim-{spec['dim']}-seed-{seed}-{digest}"
        with only_one(folder):
            if not (folder / _RECORD).is_file():
                self._train(spec, seed, folder)
        return Trained(folder, json.loads((folder / _RECORD).read_bytes()))

    def _with_rates(self, spec: dict[str, Any]) -> dict[str, Any]:
        """A specification with the learning rates that are used, wherever they are given."""
        teacher = {"teacher": self._with_rates(spec["teacher"])} if "teacher" in spec else {}
        return {**spec, "lr": self.rate(spec), **teacher}

    def _train(self, spec: dict[str, Any], seed: int, folder: Path) -> None:
        began = time.perf_counter()
        size, steps = _size(spec), self.steps(spec)
        # Step before which matrices become factors; after how many steps matrices are kept.
        factored = "parameters" in spec
        switch = round(float(spec.get("factor_at", 0)) * steps) if factored else steps
        keep = round(self.keep_at * steps)
        model, teacher = size.new_model(seed), None
        if "teacher" in spec:
            teacher = load_model(self.model(spec["teacher"], seed).folder, dtype="float32")[0]
        first, kept, parameters = 0, {}, size.parameters
        if factored and 0 < keep == switch:
            first = keep
            model.update(self._kept(spec, seed))
        descent = Descent(model, teacher, steps, self.rate(spec))
        batches = islice(self.corpus.batches(seed, self.batch, self.length), first, steps)
        for step, batch in enumerate(batches, first):
            if step == switch:
                parameters = factorize(model, size, wanted_parameters(spec["parameters"]))
                descent.restart()
            descent.take(step, mx.array(batch))
            if step + 1 == keep and not factored:
                kept = dict(tree_flatten(model.parameters()))
        last, tokens = descent.losses[-max(1, steps // 10) :], self.batch * self.length
        # Parameters of every step, summed.
        trained = switch * size.parameters + (steps - switch) * parameters
        _write(folder, size, model, kept, {
            "parameters": parameters,
            "training_tokens": steps * tokens,
            "training_flops": _FLOPS * tokens * trained,
            "training_loss": sum(last) / len(last),
            "training_seconds": time.perf_counter() - began,
        })  # fmt: skip

    def _kept(self, spec: dict[str, Any], seed: int) -> dict[str, Any]:
        """Parameters of the model without factors where its matrices were kept."""
        matrices = {k: v for k, v in spec.items() if k not in ("parameters", "factor_at")}
        stored = mx.load(str(self.model(matrices, seed).folder / _KEPT))
        return tree_unflatten(list(stored.items()))


def wanted_parameters(given: int | dict[str, Any]) -> int:
    """A number, or that of a dense model of a size."""
    return size_of(given).parameters if isinstance(given, dict) else int(given)


def _size(spec: dict[str, Any]) -> Size:
    return size_of({key: spec[key] for key in _SIZE_KEYS if key in spec})


def _write(
    folder: Path,
    size: Size,
    model: nn.Module,
    kept: dict[str, mx.array],
    numbers: dict[str, float],
) -> None:
    """A model folder; what names it complete is written last."""
    if folder.exists():
        shutil.rmtree(folder)
    with disk_errors(folder, "--output"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(size.config))
        weights = {name: mx.contiguous(w) for name, w in dense_weights(model).items()}
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
        if kept:
            mx.savez(str(folder / _KEPT), **kept)
        write_tokenizer(folder)
        (folder / _RECORD).write_text(json.dumps(numbers))
