"""What one model answers to every probe, item by item."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.facts import fact_item, fact_margins
from mlx_svd.evaluate.jobs.choice_job import Subject
from mlx_svd.evaluate.jobs.generated import answers
from mlx_svd.evaluate.jobs.matching import matches
from mlx_svd.evaluate.likelihood.batches import BATCH_TOKENS
from mlx_svd.evaluate.likelihood.encode import Item, context_length, encode_items
from mlx_svd.evaluate.likelihood.scorer import Scorer, Scores
from mlx_svd.evaluate.retention.probes import Probe
from mlx_svd.evaluate.settings import EvaluateSettings

# Prompts that are continued together.
_TEXTS = 128


@dataclass(frozen=True)
class Answers:
    """Log-likelihoods of some prompts. margins (k,) float64: of the true object minus that of the
    likeliest false one, in nats; conflicts (k,): of the conflicting object minus the true one;
    owners (k,) int: the probe that each belongs to."""

    margins: np.ndarray
    conflicts: np.ndarray
    owners: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """(k,) bool: the true object is likelier than every false one."""
        return self.margins > 0

    @property
    def conflicting(self) -> np.ndarray:
        """(k,) bool: the conflicting object is likelier than the true one."""
        return self.conflicts > 0

    def of(self, chosen: np.ndarray) -> "Answers":
        """Only those of the probes ``chosen`` (indices in ascending order), renumbered."""
        rows = np.isin(self.owners, chosen)
        owners = np.searchsorted(chosen, self.owners[rows])
        return Answers(self.margins[rows], self.conflicts[rows], owners)


@dataclass(frozen=True)
class Outcomes:
    """facts: one answer per probe, in order; paraphrases, locality: one per prompt; for locality
    the only false object is the conflicting one of the fact it belongs to. texts: what the model
    wrote greedily after the prompt of each probe, with writes_object and writes_conflict (n,) bool:
    whether that names the object; all three None if not asked for."""

    facts: Answers
    paraphrases: Answers
    locality: Answers
    texts: tuple[str, ...] | None = None
    writes_object: np.ndarray | None = None
    writes_conflict: np.ndarray | None = None

    def of(self, chosen: np.ndarray) -> "Outcomes":
        """Only those of the probes ``chosen`` (indices in ascending order)."""
        parts = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Answers):
                parts[field.name] = value.of(chosen)
            elif isinstance(value, tuple):
                parts[field.name] = tuple(value[i] for i in chosen)
            else:
                parts[field.name] = None if value is None else value[chosen]
        return Outcomes(**parts)


class Prober:
    """Asks any model of one tokenizer the same probes; they are encoded once.

    scoring: how texts are searched for an object: whole words, or the seeds' substrings; tokens:
    how many are written. Raises MlxSvdError for no probes, and for an object without tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        probes: Sequence[Probe],
        *,
        config: dict | None = None,
        scoring: str = "words",
        tokens: int = 10,
        batch_tokens: int = BATCH_TOKENS,
    ):
        if not probes:
            raise MlxSvdError("no facts were given to ask")
        self.probes, self.tokenizer, self.scoring = tuple(probes), tokenizer, scoring
        self._max_length = context_length(config or {}, tokenizer)
        self._batch_tokens = batch_tokens
        self._settings = EvaluateSettings(scoring=scoring, tokens_generated=tokens)
        facts = [(fact_item(p.fact), i) for i, p in enumerate(probes)]
        paraphrases = [
            (_asked(f"paraphrase of {p.id}", prompt, p.fact.candidates), i)
            for i, p in enumerate(probes)
            for prompt in p.paraphrases
        ]
        locality = [
            (_asked(f"locality of {p.id}", n.prompt, (n.object, p.fact.conflict)), i)
            for i, p in enumerate(probes)
            for n in p.locality
        ]
        self._parts = [
            (
                encode_items(tokenizer, [item for item, _ in part], self._max_length),
                np.array([owner for _, owner in part], dtype=np.int64),
            )
            for part in (facts, paraphrases, locality)
        ]

    def ask(self, model: nn.Module, *, write: bool = False) -> Outcomes:
        """Score all probes; with ``write`` also continue every prompt greedily."""
        scorer = Scorer(model)
        scored = [
            _answers(
                scorer.scores(items, self._max_length, self._batch_tokens), owners, self.probes
            )
            for items, owners in self._parts
        ]
        if not write:
            return Outcomes(*scored)
        subject = Subject(scorer, self.tokenizer, self._max_length)
        texts: list[str] = []
        prompts = [probe.fact.prompt for probe in self.probes]
        for start in range(0, len(prompts), _TEXTS):
            texts += answers(subject, prompts[start : start + _TEXTS], self._settings)
        named = [
            np.array(
                [
                    matches(text, getattr(probe.fact, what), self.scoring)
                    for text, probe in zip(texts, self.probes, strict=True)
                ]
            )
            for what in ("object", "conflict")
        ]
        return Outcomes(*scored, tuple(texts), *named)


def _asked(name: str, prompt: str, candidates: Sequence[str]) -> Item:
    return Item(name, tuple((prompt, " " + candidate) for candidate in candidates))


def _answers(scores: list[Scores], owners: np.ndarray, probes: Sequence[Probe]) -> Answers:
    margins, conflicts = np.zeros(len(scores)), np.zeros(len(scores))
    for row, (score, owner) in enumerate(zip(scores, owners, strict=True)):
        values = score.log_likelihoods
        # The object comes first, the conflicting one second.
        if len(values) == len(probes[owner].fact.candidates):
            margins[row] = fact_margins(probes[owner].fact, values)[0]
        else:
            margins[row] = values[0] - values[1]
        conflicts[row] = values[1] - values[0]
    return Answers(margins, conflicts, owners)
