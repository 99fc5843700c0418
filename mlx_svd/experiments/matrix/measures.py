"""What is measured of a model in each run, item by item."""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_svd.calibrate.text import Windows
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.divergence import BaseDistribution, window_divergences
from mlx_svd.evaluate.facts import facts_recalled
from mlx_svd.evaluate.generation.prompts import read_prompts
from mlx_svd.evaluate.generation.quality import GREEDY, GenerationSettings, generation_quality
from mlx_svd.evaluate.jobs.choice_job import Subject
from mlx_svd.evaluate.jobs.generated import answers
from mlx_svd.evaluate.jobs.matching import matches
from mlx_svd.evaluate.likelihood.encode import context_length
from mlx_svd.evaluate.likelihood.scorer import Scorer
from mlx_svd.evaluate.perplexity import window_losses
from mlx_svd.evaluate.prepare import Bench, read_rows
from mlx_svd.evaluate.rows.material import find_file
from mlx_svd.evaluate.settings import EvaluateSettings
from mlx_svd.evaluate.tasks import CHOICE_TASKS, check_name, reasoning
from mlx_svd.experiments.matrix.material import Facts, read_facts_of, read_text
from mlx_svd.experiments.matrix.places import Places, check_keys, file_digest
from mlx_svd.experiments.matrix.record import EXP, Measured, Metric, metric_of

KEYS = {"texts", "facts", "tasks", "generation", "kl", "composite"}
_TASK_KEYS = {"names", "rows", "limit"}
_GENERATION_KEYS = {"prompts", "tokens"}
_PROMPTS_AT_ONCE = 128
# The seeds' composite: weights of facts, MMLU and reasoning.
_COMPOSITE = {"facts_written": 0.4, "mmlu acc": 0.4, "reasoning exact_match": 0.2}


class Measures:
    """The measures that settings ask for, with their texts, facts and prompts.

    settings: ``texts`` {name: {file, windows, length}}, the first name's perplexity is "perplexity"
    and the others' "perplexity NAME"; ``kl``: also KL divergence from the original on the first
    text; ``facts`` {file, count, reserve}; ``tasks`` {names, rows, limit}; ``generation`` {prompts,
    tokens}; ``composite``: the seeds' weighted score.
    """

    def __init__(self, settings: dict[str, Any], places: Places, tokenizer: Any, config: dict):
        self.settings, self.places = settings, places
        self.tokenizer, self.config = tokenizer, config
        self.texts: dict[str, Windows] = {
            name: read_text(entry, places, tokenizer, config.get("vocab_size"))
            for name, entry in settings.get("texts", {}).items()
        }
        entry = settings.get("facts")
        self.facts: Facts | None = read_facts_of(entry, places) if entry else None

    def measure(self, model: nn.Module, base: BaseDistribution | None = None) -> Measured:
        """All measures of a model; base: predictions of the original, for the divergence."""
        measured = Measured({})
        self._texts(model, base, measured)
        if self.facts:
            self._facts(model, measured)
        if "tasks" in self.settings:
            self._tasks(model, measured)
        if "generation" in self.settings:
            self._generation(model, measured)
        if self.settings.get("composite"):
            measured.metrics["composite"] = composite(measured.metrics)
        return measured

    # -- texts and facts ------------------------------------------------------------------

    def _texts(self, model: nn.Module, base: BaseDistribution | None, measured: Measured) -> None:
        for place, (name, windows) in enumerate(self.texts.items()):
            items = [f"{name} {i}" for i in range(len(windows))]
            metric = "perplexity" if place == 0 else f"perplexity {name}"
            if place == 0 and base is not None:
                kl, _, sums = window_divergences(model, base, windows.tokens)
                counts = np.full(len(windows), windows.tokens.shape[1] - 1)
                measured.metrics["kl"] = metric_of(items, kl, counts, better=False)
            else:
                losses = window_losses(model, windows.tokens)
                sums, counts = losses.sums, losses.counts
            measured.metrics[metric] = metric_of(items, sums, counts, scale=EXP, better=False)

    def _facts(self, model: nn.Module, measured: Measured) -> None:
        facts, ids = self.facts.test, self.facts.test_ids
        found = facts_recalled(model, self.tokenizer, facts)
        chance = float(np.mean([1 / len(f.candidates) for f in facts]))
        measured.metrics["facts"] = metric_of(ids, found.recalled, chance=chance)
        measured.metrics["facts_margin"] = metric_of(ids, found.margins)
        subject = self._subject(model)
        settings = EvaluateSettings()
        texts: list[str] = []
        for start in range(0, len(facts), _PROMPTS_AT_ONCE):
            part = facts[start : start + _PROMPTS_AT_ONCE]
            texts += answers(subject, [f.prompt for f in part], settings)
        for name, scoring in (("facts_written", "words"), ("facts_substring", "seed")):
            right = [matches(t, f.object, scoring) for t, f in zip(texts, facts, strict=True)]
            measured.metrics[name] = metric_of(ids, right)

    def _subject(self, model: nn.Module) -> Subject:
        return Subject(Scorer(model), self.tokenizer, context_length(self.config, self.tokenizer))

    # -- benchmarks and texts of its own ------------------------------------------------------

    def _tasks(self, model: nn.Module, measured: Measured) -> None:
        entry = self.settings["tasks"]
        limit = self.places.limited(entry.get("limit"))
        settings = EvaluateSettings(
            limit=limit, random_rows=True, data_dir=self.places.data_dir / entry["rows"]
        )
        bench = Bench(self._subject(model), settings)
        for name in entry["names"]:
            job = read_rows(name, settings)(bench)
            records: dict[int, dict] = {}
            for number, items in enumerate(job.batches):
                records |= zip(items, job.run(number), strict=True)
            ordered = [records[i] for i in range(len(job.ids))]
            scores = job.summarize(ordered)
            for metric, score in scores.items():
                values = [float(r[metric]) for r in ordered]
                ids = [f"{name} {i} {d}" for i, d in zip(job.ids, job.doc_ids, strict=True)]
                measured.metrics[f"{name} {metric}"] = metric_of(
                    ids, values, chance=score.chance, share=set(values) <= {0.0, 1.0}
                )

    def _generation(self, model: nn.Module, measured: Measured) -> None:
        entry = self.settings["generation"]
        settings = GenerationSettings(modes=(GREEDY,), max_tokens=entry.get("tokens", 80))
        prompts = read_prompts(None, self.places.limited(entry.get("prompts", 32)))
        found = generation_quality(model, self.tokenizer, prompts, settings)
        add_generation(found.records, found.summary, measured)


def add_generation(records: Sequence[dict], summary: dict, measured: Measured) -> None:
    """rep_3 and loop of every greedy text, which lower is better, and distinct_1 of all."""
    for name in ("rep_3", "loop", "length"):
        have = [r for r in records if r[name] is not None]
        if have:
            better = None if name == "length" else False
            measured.metrics[name] = metric_of(
                [r["id"] for r in have],
                [r[name] for r in have],
                better=better,
                share=name == "loop",
            )
    if f"distinct_1,{GREEDY}" in summary:
        measured.numbers["distinct_1"] = summary[f"distinct_1,{GREEDY}"].value
    measured.details["texts"] = [{k: r[k] for k in ("id", "prompt", "text")} for r in records]


def composite(metrics: dict[str, Metric]) -> Metric:
    """0.4 facts + 0.4 MMLU + 0.2 reasoning as one metric over the items of all three: each item
    weighs so that the mean is the weighted sum. Its interval also counts the differences between
    the three levels, so it is too wide rather than too narrow; paired differences are not touched
    by that."""
    total = sum(len(metrics[name].items) for name in _COMPOSITE)
    items: list[str] = []
    values: list[float] = []
    for name, weight in _COMPOSITE.items():
        part = metrics[name]
        items += [f"{name}: {item}" for item in part.items]
        values += [v * weight * total / len(part.items) for v in part.values]
    return metric_of(items, values)


def check_measures(settings: dict[str, Any], places: Places) -> None:
    """Raise MlxSvdError for what cannot be measured, before a model is loaded."""
    if "tasks" in settings:
        check_keys("tasks", settings["tasks"], _TASK_KEYS)
        for name in settings["tasks"]["names"]:
            check_name(name)
    if "generation" in settings:
        check_keys("generation", settings["generation"], _GENERATION_KEYS)
    if settings.get("composite"):
        names = settings.get("tasks", {}).get("names", [])
        if "facts" not in settings or not {"mmlu", reasoning.NAME} <= set(names):
            raise MlxSvdError("composite: needs facts, and the tasks mmlu and reasoning")
    for entry in settings.get("texts", {}).values():
        places.file(entry["file"])


def task_digests(settings: dict[str, Any], places: Places) -> dict[str, str]:
    """Digests of the rows of the benchmarks."""
    if "tasks" not in settings:
        return {}
    folder = places.data_dir / settings["tasks"]["rows"]
    files = set()
    for name in settings["tasks"]["names"]:
        if name in CHOICE_TASKS:
            task = CHOICE_TASKS[name]
            files |= {f for f in (task.file, task.shots_file) if f}
    return {name: file_digest(find_file(folder, name)) for name in sorted(files)}
