"""Which facts a model recalls: it must find the true object likelier than every false one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.batches import BATCH_TOKENS
from mlx_svd.evaluate.likelihood.encode import Item, encode_items
from mlx_svd.evaluate.likelihood.scorer import Scorer
from mlx_svd.evaluate.statistics.intervals import Share, share_of

# A prompt of a fact is a sentence; it never comes near a model's context.
_MAX_LENGTH = 1 << 20
_FIELDS = ("relation", "subject", "object", "prompt", "conflict")


@dataclass(frozen=True)
class Fact:
    """prompt + " " + object is true; conflict and distractors are false objects for it."""

    relation: str
    subject: str
    object: str
    prompt: str
    conflict: str
    distractors: tuple[str, ...]

    @property
    def candidates(self) -> tuple[str, ...]:
        """The object, then everything it must beat."""
        return (self.object, self.conflict, *self.distractors)


@dataclass(frozen=True)
class FactRecall:
    """Per fact, in the order given. margins (n,) float64: log-likelihood of the object minus that
    of the likeliest false one, in nats; normalized_margins: the same with each log-likelihood
    divided by the length of its text in characters (acc_norm of lm-eval)."""

    margins: np.ndarray
    normalized_margins: np.ndarray

    @property
    def recalled(self) -> np.ndarray:
        """(n,) bool: the object is likelier than all others."""
        return self.margins > 0

    @property
    def recalled_normalized(self) -> np.ndarray:
        """(n,) bool: the same per character."""
        return self.normalized_margins > 0

    @property
    def share(self) -> Share:
        """Share recalled, with Wilson's 95 % interval."""
        return share_of(self.recalled)

    @property
    def share_normalized(self) -> Share:
        """Share recalled by log-likelihood per character."""
        return share_of(self.recalled_normalized)

    def kept(self, dense: "FactRecall") -> Share:
        """Of the facts that the dense model recalls, the share that is recalled here. Raises
        MlxSvdError if the two were asked different numbers of facts."""
        if len(dense.margins) != len(self.margins):
            raise MlxSvdError(
                f"facts kept: the models were asked {len(self.margins)} and {len(dense.margins)} "
                "facts; ask both the same"
            )
        return share_of(self.recalled[dense.recalled])


def read_facts(path: str | Path) -> list[Fact]:
    """Facts from a JSON list of objects with relation, subject, object, prompt, conflict (text)
    and distractors (list of text). Raises MlxSvdError naming the file and the entry."""
    path = Path(path)
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MlxSvdError(f"{path}: cannot be read as JSON; give a list of facts") from error
    if not isinstance(entries, list) or not entries:
        raise MlxSvdError(f"{path}: is not a JSON list with facts in it; give one")
    return [_fact(f"{path}: entry {number}", entry) for number, entry in enumerate(entries)]


def _fact(where: str, entry: Any) -> Fact:
    if not isinstance(entry, dict):
        raise MlxSvdError(f"{where} is not a JSON object; give one a fact")
    for key in _FIELDS:
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise MlxSvdError(f'{where} has no text in "{key}"; write one')
    false = entry.get("distractors")
    if not isinstance(false, list) or not all(isinstance(x, str) and x.strip() for x in false):
        raise MlxSvdError(f'{where} has no list of texts in "distractors"')
    if entry["object"] in (entry["conflict"], *false):
        raise MlxSvdError(f"{where}: its object {entry['object']!r} is among the false ones")
    return Fact(*(entry[key] for key in _FIELDS), tuple(false))


def facts_recalled(
    model: nn.Module, tokenizer: Any, facts: Sequence[Fact], batch_tokens: int = BATCH_TOKENS
) -> FactRecall:
    """Score every fact: total log-likelihood of " " + object after the prompt, and of the others.

    batch_tokens: padded tokens of a forward pass. Raises MlxSvdError for no facts, and for a
    continuation that has no tokens of its own.
    """
    if not facts:
        raise MlxSvdError("no facts were given to ask")
    items = encode_items(tokenizer, [fact_item(f) for f in facts], _MAX_LENGTH)
    scores = Scorer(model).scores(items, _MAX_LENGTH, batch_tokens)
    margins = np.array(
        [fact_margins(f, s.log_likelihoods) for f, s in zip(facts, scores, strict=True)]
    )
    return FactRecall(margins[:, 0], margins[:, 1])


def fact_item(fact: Fact) -> Item:
    """Prompt and candidates, the true object first."""
    pairs = tuple((fact.prompt, " " + candidate) for candidate in fact.candidates)
    return Item(f"fact {fact.subject!r} ({fact.relation})", pairs)


def fact_margins(fact: Fact, log_likelihoods: np.ndarray) -> tuple[float, float]:
    """How much likelier the object is than the likeliest false one, in nats, and the same with
    log-likelihoods per character."""
    normalized = log_likelihoods / np.array([len(x) for x in fact.candidates])
    return tuple(float(x[0] - x[1:].max()) for x in (log_likelihoods, normalized))
