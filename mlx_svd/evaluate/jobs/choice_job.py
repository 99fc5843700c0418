"""Questions with choices, or prompts with an answer, as batches of log-likelihoods."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_svd.evaluate.jobs.base import Base
from mlx_svd.evaluate.jobs.job import Job, Record, Score, mean_score, numbers
from mlx_svd.evaluate.likelihood.encode import EncodedItem, Item, encode_items
from mlx_svd.evaluate.likelihood.scorer import Scorer, Scores
from mlx_svd.evaluate.rows.choice_task import ChoiceTask
from mlx_svd.evaluate.rows.material import Material
from mlx_svd.evaluate.rows.read import Row
from mlx_svd.evaluate.settings import EvaluateSettings


@dataclass(frozen=True)
class Subject:
    """What is evaluated: scorer of the model, its tokenizer, its context in tokens."""

    scorer: Scorer
    tokenizer: Any
    max_length: int


def choice_job(
    task: ChoiceTask,
    material: Material,
    subject: Subject,
    settings: EvaluateSettings,
    base: Base | None = None,
) -> Job:
    """A job of one record per question: log_likelihoods of its choices, target, metrics; with a
    base model also flip: right in one of the two and wrong in the other."""
    shots = task.fixed_shots if task.fixed_shots is not None else settings.num_fewshot
    examples = task.shots(material.rows, material.pool, shots, settings.seed, own=material.own)
    pairs = zip(material.rows, examples, strict=True)
    items = [task.item(row, drawn) for row, drawn in pairs]
    flips = base is not None and task.graded_by_one_answer
    known: dict[int, Record] = {}
    if flips:
        asked = replace(settings, num_fewshot=shots)
        known = base.records(
            task.name, material.digest, material.doc_ids, asked, subject.max_length
        )
    number_of = {row.where: i for row, i in zip(material.rows, material.doc_ids, strict=True)}
    names = [*task.metric_names, "flip"] if flips else list(task.metric_names)

    def record(row: Row, item: EncodedItem, scores: Scores) -> Record:
        metrics = task.metrics(row, scores.log_likelihoods)
        if flips:
            metrics["flip"] = float(metrics["acc"] != known[number_of[row.where]]["acc"])
        return {
            "target": row.label,
            "log_likelihoods": scores.log_likelihoods.tolist(),
            **truncation(item.truncated),
            "metrics": names,
            **metrics,
        }

    def summarize(records: Sequence[Record]) -> dict[str, Score]:
        chance = float(np.mean([task.chance(row) for row in material.rows]))
        scores = {
            name: mean_score([r[name] for r in records], chance=chance)
            for name in task.metric_names
        }
        if flips:
            scores["flip"] = mean_score([r["flip"] for r in records], better=False)
        return scores

    fields = numbers(names)
    job = _job(task.name, items, material, subject, settings, record, summarize, fields)
    job.version, job.shots = task.version, shots
    return job


def answer_job(name: str, material: Material, subject: Subject, settings: EvaluateSettings) -> Job:
    """A job for rows of prompt and answer. acc: the model would generate the answer, token by
    token; loglikelihood: of the answer, with num_tokens."""
    subject.scorer.greedy = True
    items = [Item(row.where, ((row.question, " " + row.answer),)) for row in material.rows]

    def record(row: Row, item: EncodedItem, scores: Scores) -> Record:
        return {
            "target": row.answer,
            "loglikelihood": float(scores.log_likelihoods[0]),
            "num_tokens": len(item.pairs[0][1]),
            **truncation(item.truncated),
            "metrics": ["acc"],
            "acc": float(scores.greedy[0]),
        }

    def summarize(records: Sequence[Record]) -> dict[str, Score]:
        values = [r["loglikelihood"] for r in records]
        likelihood = mean_score(values, bounds=(-math.inf, 0.0))
        return {"acc": mean_score([r["acc"] for r in records]), "loglikelihood": likelihood}

    fields = numbers(("acc", "loglikelihood"))
    return _job(name, items, material, subject, settings, record, summarize, fields)


def truncation(cut: int) -> dict[str, int]:
    """For the record: how many tokens a prompt lost, if any."""
    return {"truncated": cut} if cut else {}


def truncation_notes(name: str, cuts: Sequence[int], max_length: int) -> list[str]:
    """How many prompts of a task were longer than the context, if any. cuts: tokens that each
    lost."""
    cut = [count for count in cuts if count]
    if not cut:
        return []
    return [
        f"{name}: {len(cut)} of {len(cuts)} prompts are longer than the context of {max_length} "
        f"tokens and lost their beginning (at most {max(cut)} tokens)"
    ]


def _job(name, items, material, subject, settings, record, summarize, fields) -> Job:
    encoded = encode_items(subject.tokenizer, items, subject.max_length)
    batches = subject.scorer.batches(encoded, subject.max_length, settings.batch_tokens)

    cuts = [item.truncated for item in encoded]

    def run(number: int) -> list[Record]:
        batch = batches[number]
        scores = subject.scorer.score_batch(encoded, batch)
        pairs = zip(batch.items, scores, strict=True)
        return [record(material.rows[i], encoded[i], s) for i, s in pairs]

    return Job(
        name, 0.0, 0, [row.id for row in material.rows], material.doc_ids, material.total,
        material.digest, material.origin, [batch.items for batch in batches], run, summarize,
        fields, notes=truncation_notes(name, cuts, subject.max_length),
    )  # fmt: skip
