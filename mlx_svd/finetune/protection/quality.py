"""What fine-tuning does to the rest of a model: perplexity, conversation, generated texts.

Perplexity is no stand-in for knowledge nor for texts: all are measured for every arm.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_svd.evaluate.generation.prompts import Prompt
from mlx_svd.evaluate.generation.quality import GREEDY, GenerationSettings, generation_quality
from mlx_svd.evaluate.generation.summary import generation_differences, generation_summary
from mlx_svd.evaluate.jobs.choice_job import Subject
from mlx_svd.evaluate.likelihood.encode import context_length
from mlx_svd.evaluate.likelihood.scorer import Scorer
from mlx_svd.evaluate.perplexity import WindowLosses, perplexity_of, ratio, window_losses
from mlx_svd.evaluate.retention.summary import NOT_MEASURED
from mlx_svd.evaluate.rows.read import read_jsonl
from mlx_svd.evaluate.settings import EvaluateSettings
from mlx_svd.evaluate.tasks import conversation

_SHOWN = ("rep_2", "rep_3", "rep_4", "loop", "length", "distinct_1", "distinct_2", "distinct_3")


@dataclass(frozen=True)
class QualityMaterial:
    """held_out (N, L): windows of the text for perplexity; prompts: to continue; max_tokens: of a
    continuation; conversations: file of {messages} rows, None: not measured."""

    held_out: np.ndarray
    prompts: Sequence[Prompt]
    max_tokens: int
    conversations: Path | None = None


@dataclass(frozen=True)
class Quality:
    """losses: of the held-out windows; texts: generation records, one a prompt; conversation: its
    perplexity with interval, None if not measured."""

    losses: WindowLosses
    texts: list[dict[str, Any]]
    conversation: dict[str, Any] | None


def measure_quality(
    model: nn.Module, tokenizer: Any, config: dict, material: QualityMaterial
) -> Quality:
    """Of one model. Raises MlxSvdError for what ``window_losses``, ``generation_quality`` and the
    conversation task refuse."""
    settings = GenerationSettings(modes=(GREEDY,), max_tokens=material.max_tokens)
    texts = []
    if material.prompts:
        texts = generation_quality(model, tokenizer, material.prompts, settings).records
    spoken = None
    if material.conversations is not None:
        spoken = _conversation(model, tokenizer, config, material.conversations)
    return Quality(window_losses(model, material.held_out), texts, spoken)


def quality_summary(quality: Quality, base: Quality | None = None) -> dict[str, Any]:
    """perplexity, conversation_perplexity and "metric" of the greedy texts (see
    ``generation_summary``), each with a 95 % interval; with ``base`` also the ratio of perplexities
    (paired by window) and the differences of the texts (paired by prompt)."""
    found: dict[str, Any] = {"perplexity": asdict(perplexity_of(quality.losses))}
    if base is not None:
        found["perplexity_ratio"] = asdict(ratio(quality.losses, base.losses))
    found["conversation_perplexity"] = quality.conversation or {
        NOT_MEASURED: "no conversations were given"
    }
    if not quality.texts:
        return found | {"generation": {NOT_MEASURED: "no prompts were continued"}}
    summary = generation_summary(quality.texts)
    found["generation"] = {
        name: asdict(summary[f"{name},{GREEDY}"])
        for name in _SHOWN
        if f"{name},{GREEDY}" in summary
    }
    if base is not None:
        changes = generation_differences(base.texts, quality.texts)
        found["generation_change"] = {
            name: asdict(changes[f"{name},{GREEDY}"])
            for name in _SHOWN
            if f"{name},{GREEDY}" in changes
        }
    return found


def _conversation(model: nn.Module, tokenizer: Any, config: dict, path: Path) -> dict[str, Any]:
    """Perplexity of replies, by the conversation task of ``evaluate``."""
    rows = [(where, conversation.checked(where, entry)) for where, entry in read_jsonl(path)]
    subject = Subject(Scorer(model), tokenizer, context_length(config, tokenizer))
    job = conversation.job(rows, path.name, subject, EvaluateSettings())
    records: dict[int, dict] = {}
    for number, items in enumerate(job.batches):
        records |= zip(items, job.run(number), strict=True)
    score = job.summarize([records[i] for i in sorted(records)])["token_perplexity"]
    finite = {k: v for k in ("value", "low", "high") if math.isfinite(v := getattr(score, k))}
    return {**finite, "n": len(rows)}
