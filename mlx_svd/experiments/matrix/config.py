"""The YAML file of an experiment."""

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.methods import slug

_KEYS = {
    "title", "seed_says", "kind", "settings", "seeds", "seconds_per_run", "conditions", "baseline",
    "primary", "metrics", "comparisons", "within", "correlations", "interactions", "verdicts",
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """name: unique; settings: what the kind reads; baseline: name of the condition that it is
    compared with, None for a condition that is compared with nothing."""

    name: str
    settings: dict[str, Any]
    baseline: str | None


@dataclass(frozen=True)
class Comparison:
    """b - a, on the same items and seeds."""

    a: str
    b: str


@dataclass(frozen=True)
class Interaction:
    """How a difference depends on how good the model was: the slope of (b - a) over the base's
    value, all of the primary metric, fitted in each seed over the points (base, comparison)."""

    name: str
    points: tuple[tuple[str, Comparison], ...]


@dataclass(frozen=True)
class Experiment:
    """title, seed_says: what is tested and what the seed documents say of it; kind: name in
    ``KINDS``; settings: of the kind, the same for all conditions; seeds: of conditions in which
    something is random; seconds_per_run: a guess, before any record is there; primary: the metric
    that claims rest on; metrics: those compared (empty: all); comparisons: further pairs besides
    each condition against its baseline; within: pairs of metrics compared in the runs of each
    condition (before and after quantizing); correlations: pairs of metrics, over conditions;
    verdicts: (bound, word) for the bad end of the primary difference, (None, word) beyond the last.
    """

    name: str
    title: str
    seed_says: str
    kind: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    seconds_per_run: float | None
    conditions: tuple[Condition, ...]
    primary: str
    metrics: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    within: tuple[tuple[str, str], ...] = ()
    correlations: tuple[tuple[str, str], ...] = ()
    interactions: tuple[Interaction, ...] = ()
    verdicts: tuple[tuple[float | None, str], ...] = field(default=())

    @property
    def pairs(self) -> tuple[Comparison, ...]:
        """Every condition against its baseline, then the further comparisons."""
        against = [Comparison(c.baseline, c.name) for c in self.conditions if c.baseline]
        return tuple(dict.fromkeys([*against, *self.comparisons]))


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment's file; MlxSvdError that names the file and the key."""
    if not path.is_file():
        raise MlxSvdError(f"{path}: no such experiment file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise MlxSvdError("an experiment is a mapping with keys such as kind and conditions")
        return _experiment(path.stem, content)
    except yaml.YAMLError as error:
        raise MlxSvdError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except MlxSvdError as error:
        raise MlxSvdError(f"{path}: {error}") from error
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise MlxSvdError(f"{path}: {error!r} is missing or not a valid value") from error


def expanded(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """An entry with ``grid: {axis: values}`` -> one entry for each combination, in which "{axis}"
    stands for the value: alone it becomes the value itself, within a text its text."""
    grid = entry.get("grid")
    if grid is None:
        return [entry]
    rest = {key: value for key, value in entry.items() if key != "grid"}
    axes = list(grid)
    return [
        _filled(rest, dict(zip(axes, values, strict=True))) for values in product(*grid.values())
    ]


def _filled(value: Any, axes: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(v, axes) for key, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, axes) for v in value]
    if not isinstance(value, str):
        return value
    if value.startswith("{") and value.endswith("}") and value[1:-1] in axes:
        return axes[value[1:-1]]
    for name, chosen in axes.items():
        value = value.replace("{" + name + "}", str(chosen))
    return value


def _experiment(name: str, content: dict[str, Any]) -> Experiment:
    for key in content:
        if key not in _KEYS:
            raise MlxSvdError(f"unknown key {key!r}; use {', '.join(sorted(_KEYS))}")
    conditions = _conditions(content)
    names = {c.name for c in conditions}
    comparisons = tuple(
        _comparison(e, names) for entry in content.get("comparisons", []) for e in expanded(entry)
    )
    interactions = tuple(
        Interaction(
            str(entry["name"]),
            tuple(
                (_known(e["base"], names), _comparison(e, names))
                for point in entry["points"]
                for e in expanded(point)
            ),
        )
        for entry in content.get("interactions", [])
    )
    seeds = tuple(int(seed) for seed in content.get("seeds", [0]))
    if not seeds or len(set(seeds)) < len(seeds):
        raise MlxSvdError(
            f"seeds {list(seeds)}: give at least one, none twice: the same seed gives the same run"
        )
    verdicts = tuple(
        (None if bound is None else float(bound), str(word))
        for bound, word in content.get("verdicts", [])
    )
    bounds = [bound for bound, _ in verdicts]
    if verdicts and (bounds[-1] is not None or bounds[:-1] != sorted(bounds[:-1])):
        raise MlxSvdError("verdicts: give rising bounds, and null with the last word")
    return Experiment(
        name=name,
        title=str(content["title"]),
        seed_says=str(content.get("seed_says", "")),
        kind=str(content["kind"]),
        settings=dict(content.get("settings") or {}),
        seeds=seeds,
        seconds_per_run=content.get("seconds_per_run"),
        conditions=conditions,
        primary=str(content["primary"]),
        metrics=tuple(content.get("metrics", ())),
        comparisons=comparisons,
        within=tuple((str(a), str(b)) for a, b in content.get("within", [])),
        correlations=tuple((str(a), str(b)) for a, b in content.get("correlations", [])),
        interactions=interactions,
        verdicts=verdicts,
    )


def _conditions(content: dict[str, Any]) -> tuple[Condition, ...]:
    """Conditions in their order; each is compared with the experiment's baseline unless it names
    another one."""
    found: list[Condition] = []
    for entry in (e for listed in content["conditions"] for e in expanded(listed)):
        name = str(entry["name"])
        baseline = entry.get("baseline", content.get("baseline"))
        settings = {k: v for k, v in entry.items() if k not in ("name", "baseline")}
        found.append(Condition(name, settings, None if baseline == name else baseline))
    if not found:
        raise MlxSvdError("an experiment needs conditions")
    names = [slug(c.name) for c in found]
    for condition, short in zip(found, names, strict=True):
        if names.count(short) > 1:
            raise MlxSvdError(f"condition {condition.name!r}: the name is given twice")
    known = {c.name for c in found}
    for condition in found:
        if condition.baseline is not None and condition.baseline not in known:
            raise MlxSvdError(
                f"condition {condition.name!r}: its baseline {condition.baseline!r} is no condition"
            )
    return tuple(found)


def _comparison(entry: dict[str, Any], names: set[str]) -> Comparison:
    return Comparison(_known(entry["a"], names), _known(entry["b"], names))


def _known(name: Any, names: set[str]) -> str:
    if name not in names:
        raise MlxSvdError(f"comparisons: {name!r} is no condition")
    return name
