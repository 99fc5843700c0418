"""Which facts a model recalls: it must find the true object likelier than every false one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.forward import LOGIT_BYTES, vocabulary_size
from mlx_svd.evaluate.statistics import Share, share_of

# Sequences per forward pass, where the logits allow as many.
_BATCH = 128
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
        raise MlxSvdError(f"{path}: is not a JSON list with facts in it")
    return [_fact(f"{path}: entry {number}", entry) for number, entry in enumerate(entries)]


def _fact(where: str, entry: Any) -> Fact:
    if not isinstance(entry, dict):
        raise MlxSvdError(f"{where} is not a JSON object")
    for key in _FIELDS:
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise MlxSvdError(f'{where} has no text in "{key}"')
    false = entry.get("distractors")
    if not isinstance(false, list) or not all(isinstance(x, str) and x.strip() for x in false):
        raise MlxSvdError(f'{where} has no list of texts in "distractors"')
    if entry["object"] in (entry["conflict"], *false):
        raise MlxSvdError(f"{where}: its object {entry['object']!r} is among the false ones")
    return Fact(*(entry[key] for key in _FIELDS), tuple(false))


def facts_recalled(model: nn.Module, tokenizer: Any, facts: Sequence[Fact]) -> FactRecall:
    """Score every fact: total log-likelihood of " " + object after the prompt, and of the others.

    Raises MlxSvdError for no facts, and for a continuation that has no tokens of its own.
    """
    if not facts:
        raise MlxSvdError("no facts were given to ask")
    pairs = [encode_pair(tokenizer, f.prompt, " " + x) for f in facts for x in f.candidates]
    scores = continuation_log_likelihoods(model, pairs)
    margins, normalized, end = [], [], 0
    for fact in facts:
        start, end = end, end + len(fact.candidates)
        lengths = np.array([len(x) for x in fact.candidates])
        for values, found in (
            (scores[start:end], margins),
            (scores[start:end] / lengths, normalized),
        ):
            found.append(values[0] - values[1:].max())
    return FactRecall(np.array(margins), np.array(normalized))


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """(tokens of context and continuation, how many of them are the context's).

    As lm-eval's ``_encode_pair``: trailing spaces move to the continuation; both are encoded as
    one text, and the continuation's tokens are what follows as many tokens as the context has
    alone, even where a merge across the boundary made these other tokens.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole, length = tokenizer.encode(stripped + continuation), len(tokenizer.encode(stripped))
    if not 0 < length < len(whole):
        raise MlxSvdError(
            f"{stripped + continuation!r}: {continuation!r} has no tokens of its own after "
            f"{stripped!r}; change the prompt"
        )
    return list(whole), length


def continuation_log_likelihoods(
    model: nn.Module, pairs: Sequence[tuple[list[int], int]]
) -> np.ndarray:
    """(n,) float64: log-likelihood in nats of the tokens of each pair after its context.

    Pairs of similar length share a batch; they are padded on the right, which causal attention
    never looks at, and padded positions are not counted. Raises MlxSvdError for NaN.
    """
    scores, vocabulary = np.zeros(len(pairs)), vocabulary_size(model)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    longest = len(pairs[order[-1]][0])
    step = max(1, min(_BATCH, LOGIT_BYTES // (4 * vocabulary * longest)))
    for start in range(0, len(order), step):
        rows = order[start : start + step]
        scores[rows] = _batch_scores(model, [pairs[i] for i in rows], vocabulary)
    if np.isnan(scores).any():
        raise MlxSvdError(
            "facts: a log-likelihood is NaN; the model overflows or holds NaN, load it in float32 "
            "or make the checkpoint again"
        )
    return scores


def _batch_scores(
    model: nn.Module, pairs: list[tuple[list[int], int]], vocabulary: int
) -> np.ndarray:
    width = max(len(tokens) for tokens, _ in pairs)
    tokens = np.zeros((len(pairs), width), dtype=np.int32)
    counted = np.zeros((len(pairs), width - 1), dtype=np.float32)
    for row, (ids, context) in enumerate(pairs):
        tokens[row, : len(ids)] = ids
        counted[row, context - 1 : len(ids) - 1] = 1
    if tokens.max() >= vocabulary:
        raise MlxSvdError(
            f"token id {tokens.max()} is beyond the model's vocabulary of {vocabulary}; tokenizer "
            "and model do not belong together"
        )
    ids = mx.array(tokens)
    logits = model(ids[:, :-1]).astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, ids[:, 1:], reduction="none")
    # where, not a product: a padded position may be infinite, and 0 times infinity is NaN.
    losses = mx.where(mx.array(counted) > 0, losses, 0.0)
    return -np.array(losses.sum(axis=-1), dtype=np.float64)
