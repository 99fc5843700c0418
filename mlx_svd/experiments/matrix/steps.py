"""A condition's steps: truncate, disturb or quantize the weights of a loaded model, in order.

- truncate {projections, layers, rank_ratio | rank | energy | parameters, scorer, leaky}: the best
  rank-r approximation under a scorer, multiplied back;
- noise {as truncate}: Gaussian noise of the norm of what that truncation would change, matrix by
  matrix: what damage alone does;
- quantize {granularity, bits, group_size, modules}: rounded and multiplied back; modules:
  projections (default), or all, which is the embedding, the head and the norms too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.analyze.truncations import replaced
from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.matrix.places import check_keys
from mlx_svd.experiments.matrix.quantizers import Quantizer
from mlx_svd.experiments.matrix.ranks import Rank, rank_of
from mlx_svd.experiments.matrix.workbench import METHODS, RANDOM, Workbench, generator
from mlx_svd.plan.recipe import parse_projections
from mlx_svd.source.families import Projection

STEPS = ("truncate", "noise", "quantize")
_TRUNCATE_KEYS = {
    "projections", "layers", "rank_ratio", "rank", "energy", "parameters", "scorer", "leaky",
}  # fmt: skip
_QUANTIZE_KEYS = {"granularity", "bits", "group_size", "modules", "projections"}
_MODULES = ("projections", "all")


@dataclass
class Changed:
    """weights: projection -> its new weight (m, n), others: module -> its new parameter ``weight``;
    ranks: of truncated projections; quantizers: of quantized projections and modules."""

    weights: dict[str, np.ndarray] = field(default_factory=dict)
    others: dict[str, np.ndarray] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    quantizers: dict[str, Quantizer] = field(default_factory=dict)


def check_steps(steps: list[dict[str, Any]]) -> None:
    """Raise MlxSvdError for a step that makes no sense."""
    for step in steps:
        if len(step) != 1 or next(iter(step)) not in STEPS:
            raise MlxSvdError(f"step {step}: give one of {', '.join(STEPS)}")
        name, options = next(iter(step.items()))
        if name == "quantize":
            check_keys("quantize", options, _QUANTIZE_KEYS)
            _quantizer(options)
            if options.get("modules", "projections") not in _MODULES:
                raise MlxSvdError(f"quantize modules: use {' or '.join(_MODULES)}")
            continue
        check_keys(name, options, _TRUNCATE_KEYS)
        rank_of(options)
        parse_projections(options.get("projections", "q,k,o"))
        if options.get("scorer", "plain") not in METHODS:
            raise MlxSvdError(f"{name} scorer {options['scorer']!r}: use {', '.join(METHODS)}")
        if options.get("leaky") and options.get("scorer") != "importance":
            raise MlxSvdError(f"{name}: leaky is about the prompts of the scorer importance")


def steps_are_seeded(steps: list[dict[str, Any]]) -> bool:
    """Whether a seed changes what the steps do: noise, random components, a calibration text or
    prompts that are drawn."""
    for step in steps:
        name, options = next(iter(step.items()))
        if name == "noise" or options.get("scorer", "plain") != "plain":
            return True
        if options.get("granularity") == "compensated":
            return True
    return False


def run_steps(bench: Workbench, steps: list[dict[str, Any]], seed: int) -> Changed:
    """What the steps make of the original model. Raises MlxSvdError for a layer or a projection
    that the model lacks."""
    changed = Changed()
    for step in steps:
        name, options = next(iter(step.items()))
        if name == "quantize":
            _quantize(bench, options, seed, changed)
        else:
            _truncate(bench, options, seed, changed, as_noise=name == "noise")
    return changed


@contextmanager
def applied(bench: Workbench, changed: Changed) -> Iterator[nn.Module]:
    """The model with the changed weights; the originals come back at the end."""
    modules = bench.subject.modules
    originals = {path: modules[path].weight for path in changed.others}
    try:
        for path, weight in changed.others.items():
            modules[path].weight = mx.array(weight.astype(np.float32)).astype(originals[path].dtype)
        with replaced(bench.subject, changed.weights):
            yield bench.subject.model
    finally:
        for path, weight in originals.items():
            modules[path].weight = weight


def relative_change(bench: Workbench, changed: Changed) -> float:
    """||V - W||_F / ||W||_F over all projections that were changed; 0 for none."""
    squares = [
        (np.square(changed.weights[p] - w).sum(), np.square(w).sum(dtype=np.float64))
        for p, w in bench.originals.items()
        if p in changed.weights
    ]
    error, total = np.sum(squares, axis=0) if squares else (0.0, 1.0)
    return float(np.sqrt(error / total))


def _chosen(bench: Workbench, options: dict[str, Any], default: str) -> list[Projection]:
    names = parse_projections(options.get("projections", default))
    return bench.subject.chosen(names, options.get("layers"))


def _truncate(
    bench: Workbench, options: dict[str, Any], seed: int, changed: Changed, *, as_noise: bool
) -> None:
    scorer, leaky = options.get("scorer", "plain"), bool(options.get("leaky"))
    projections = _chosen(bench, options, "q,k,o")
    rank: Rank = rank_of(options).fitted(bench.subject, projections)
    for p in projections:
        weight = changed.weights.get(p.path, bench.originals[p.path])

        def decomposition(rank: int | None = None, p=p, weight=weight):
            return bench.decomposition(p, weight, scorer, seed, rank, leaky=leaky)

        depth = p.layer / max(1, bench.subject.layers - 1)
        chosen = rank.choose(p, depth, lambda get=decomposition: get().energies)
        if chosen == min(p.shape):
            continue  # at full rank nothing is removed
        found = decomposition(chosen).truncated(chosen)
        if as_noise:
            noise = generator(seed, p.path).standard_normal(p.shape)
            changed.ranks.pop(p.path, None)
            found = weight + noise * (np.linalg.norm(found - weight) / np.linalg.norm(noise))
        else:
            changed.ranks[p.path] = chosen
        changed.weights[p.path] = found
        # What was rounded before is no longer on its grid, and must be stored unquantized.
        changed.quantizers.pop(p.path, None)


def _quantize(bench: Workbench, options: dict[str, Any], seed: int, changed: Changed) -> None:
    quantizer = _quantizer(options)
    for p in _chosen(bench, options, "all"):
        weight = changed.weights.get(p.path, bench.originals[p.path])
        compensated = quantizer.granularity == "compensated"
        second = bench.statistics(p, seed).second if compensated else None
        changed.weights[p.path] = quantizer.rounded(weight, second)
        changed.quantizers[p.path] = quantizer
    if options.get("modules", "projections") == "all":
        for path, module in other_modules(bench).items():
            weight = np.array(module.weight.astype(mx.float32))
            if quantizer.grouped and not quantizer.fills_groups(weight.shape):
                continue  # MLX leaves norms as they are
            changed.others[path] = quantizer.rounded(weight)
            changed.quantizers[path] = quantizer


def other_modules(bench: Workbench) -> dict[str, nn.Module]:
    """Modules with a parameter ``weight`` that hold no projection, by path."""
    held = {linear.path for linear in bench.subject.source.linears}
    return {
        path: module
        for path, module in bench.subject.modules.items()
        if path not in held and isinstance(module.get("weight"), mx.array)
    }


def _quantizer(options: dict[str, Any]) -> Quantizer:
    return Quantizer(
        options.get("granularity", "group"), options.get("bits", 8), options.get("group_size", 64)
    )


__all__ = ["RANDOM", "Changed", "applied", "check_steps", "run_steps", "steps_are_seeded"]
