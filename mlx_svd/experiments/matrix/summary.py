"""The records of an experiment -> numbers with intervals, tests, correlations, verdicts."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mlx_svd import __version__
from mlx_svd.evaluate.statistics.intervals import (
    Estimate,
    estimate_of_sums,
    mean_interval,
    window_estimate,
)
from mlx_svd.evaluate.statistics.paired import holm
from mlx_svd.experiments.matrix.comparisons import compare_runs, one_answer
from mlx_svd.experiments.matrix.config import Experiment
from mlx_svd.experiments.matrix.record import EXP, Measured, Metric, from_json
from mlx_svd.experiments.matrix.relations import correlate, interact
from mlx_svd.strict_json import finite

# Run of a condition in which nothing is random.
Runs = dict[int | None, Measured]


def summarize(experiment: Experiment, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """JSON: ``cells`` (every condition and metric), ``numbers``, ``comparisons`` with p values
    adjusted by Holm within each metric, ``correlations``, ``interactions``, ``failed`` runs,
    ``notes``; see docs/experiments.md. Records of failed runs hold a ``reason``."""
    runs: dict[str, Runs] = {c.name: {} for c in experiment.conditions}
    failed, notes = [], {}
    for record in records:
        if "reason" in record:
            failed.append({k: record[k] for k in ("condition", "seed", "reason")})
            continue
        measured = from_json(record)
        runs[record["condition"]][record["seed"]] = measured
        for note in measured.notes:
            notes.setdefault(note, record["condition"])
    comparisons = _comparisons(experiment, runs)
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "seed_says": experiment.seed_says,
        "kind": experiment.kind,
        "settings": experiment.settings,
        "primary": experiment.primary,
        "seeds": list(experiment.seeds),
        "version": __version__,
        "runs": len(records),
        "seconds": round(sum(r["seconds"] for r in records), 1),
        "cpu_seconds": round(sum(r["cpu_seconds"] for r in records), 1),
        "cells": [cell for name, found in runs.items() for cell in _cells(name, found)],
        "numbers": [n for name, found in runs.items() for n in _numbers(name, found)],
        "comparisons": comparisons,
        "correlations": [correlate(a, b, runs) for a, b in experiment.correlations],
        "interactions": [interact(i, experiment.primary, runs) for i in experiment.interactions],
        "failed": failed,
        "notes": [{"condition": c, "note": note} for note, c in notes.items()],
    }


def _cells(name: str, runs: Runs) -> list[dict[str, Any]]:
    """One for each metric of a condition. value: mean over all runs; std, seeds: of the runs'
    values, None for one run; items: interval over items."""
    if not runs:
        return []
    cells = []
    for metric in dict.fromkeys(m for run in runs.values() for m in run.metrics):
        parts = [run.metrics[metric] for run in runs.values() if metric in run.metrics]
        first = parts[0]
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for part in parts:
            for item, value, weight in zip(part.items, part.values, part.weights, strict=True):
                sums[item] = sums.get(item, 0.0) + value
                counts[item] = counts.get(item, 0.0) + weight
        found = _over_items(parts, *(np.array(list(x.values())) for x in (sums, counts)))
        shown = [part.shown(part.mean) for part in parts]
        over_seeds = None
        if len(parts) > 1:
            _, *ends = mean_interval([part.mean for part in parts], np.ones(len(parts)))
            over_seeds = [finite(first.shown(end)) for end in ends]
        cells.append(
            {
                "condition": name,
                "metric": metric,
                "scale": first.scale,
                "better": first.better,
                "value": finite(first.shown(found.value)),
                "std": float(np.std(shown, ddof=1)) if len(shown) > 1 else None,
                "over_seeds": over_seeds,
                "over_items": [finite(first.shown(found.low)), finite(first.shown(found.high))],
                "items": len(sums),
                "runs": len(parts),
                "deterministic": list(runs) == [None],
                "chance": first.chance,
                "at_chance": first.chance is not None and found.contains(first.chance),
            }
        )
    return cells


def _over_items(parts: list[Metric], sums: np.ndarray, counts: np.ndarray) -> Estimate:
    """The mean with its interval over items, of which each may have been asked in several runs."""
    share = all(part.share for part in parts)
    if share and one_answer(sums, counts):
        return estimate_of_sums(sums / counts, np.ones(len(counts)))
    return window_estimate(sums, counts, (0, 1) if share else (-math.inf, math.inf))


def _numbers(name: str, runs: Runs) -> list[dict[str, Any]]:
    """Mean and standard deviation over runs of what has no items."""
    found = []
    for key in dict.fromkeys(k for run in runs.values() for k in run.numbers):
        values = [run.numbers[key] for run in runs.values() if key in run.numbers]
        found.append(
            {
                "condition": name,
                "number": key,
                "value": float(np.mean(values)),
                "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "runs": len(values),
            }
        )
    return found


def _comparisons(experiment: Experiment, runs: dict[str, Runs]) -> list[dict[str, Any]]:
    found = []
    for pair in experiment.pairs:
        a, b = runs[pair.a], runs[pair.b]
        if not a or not b:
            continue
        for metric in dict.fromkeys(m for run in b.values() for m in run.metrics):
            wanted = not experiment.metrics or metric in experiment.metrics
            if not wanted and metric != experiment.primary:
                continue
            if not _common(a, b, metric):
                continue
            entry = {"a": pair.a, "b": pair.b, "metric": metric, "verdict": None}
            entry |= asdict(compare_runs(a, b, metric))
            if metric == experiment.primary:
                entry["verdict"] = _verdict(experiment, entry)
            found.append(entry)
    for first, second in experiment.within:
        for name, found_runs in runs.items():
            have = [m.metrics for m in found_runs.values()]
            if any(first in m and second in m for m in have):
                entry = {"a": name, "b": name, "metric": f"{first}, then {second}", "verdict": None}
                both = {s: m for s, m in found_runs.items() if {first, second} <= m.metrics.keys()}
                found.append(entry | asdict(compare_runs(both, both, first, second)))
    # Claims are made metric by metric: a family is all comparisons of one.
    for metric in {entry["metric"] for entry in found}:
        family = [entry for entry in found if entry["metric"] == metric]
        for entry, p in zip(family, holm([entry["p"] for entry in family]), strict=True):
            entry["p_holm"] = p
            entry["family"] = len(family)
    for entry in found:
        for key in ("value", "items_low", "items_high", "seeds_low", "seeds_high"):
            entry[key] = finite(entry[key])
    return found


def _common(a: Runs, b: Runs, metric: str) -> bool:
    """Whether some seed measured this in both; None stands for every seed."""
    seeds = [{s for s, run in runs.items() if metric in run.metrics} for runs in (a, b)]
    return bool(seeds[0] & seeds[1]) or (any(None in s for s in seeds) and all(seeds))


def _verdict(experiment: Experiment, entry: dict[str, Any]) -> str | None:
    """The first word whose bound the bad end of the interval keeps to: the upper end where less is
    better, else the lower end with its sign changed (a loss)."""
    if not experiment.verdicts or entry["better"] is None:
        return None
    low, high = entry["items_low"], entry["items_high"]
    if entry["seeds_low"] is not None:
        low, high = min(low, entry["seeds_low"]), max(high, entry["seeds_high"])
    if low is None or high is None:
        return None
    worst = high if not entry["better"] else -low
    if entry["scale"] == EXP and entry["better"]:
        worst = 1 / low if low > 0 else math.inf
    return next(word for bound, word in experiment.verdicts if bound is None or worst <= bound)
