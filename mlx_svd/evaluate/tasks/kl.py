"""How far a model's predictions are from those of a base model (--base MODEL). No chance level.

Text: as perplexity, in windows of at most 512 tokens. Metrics: kl, KL(base || model) in nats per
token over the whole vocabulary; agreement, share of tokens at which both rank the same one first;
first_divergence: greedy texts of both, begun with the first 32 tokens of a window, are equal for so
many tokens (64 if they do not part). Flips of single answers are given by every task with choices
when --base is given.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.divergence import window_divergences
from mlx_svd.evaluate.jobs.choice_job import Subject
from mlx_svd.evaluate.jobs.job import Job, Record, Score, numbers, score_of
from mlx_svd.evaluate.likelihood.encode import tokens_hash, tokens_of
from mlx_svd.evaluate.likelihood.greedy import greedy_tokens
from mlx_svd.evaluate.likelihood.scorer import Scorer
from mlx_svd.evaluate.rows.material import pick
from mlx_svd.evaluate.rows.wikitext import detokenized
from mlx_svd.evaluate.settings import EvaluateSettings
from mlx_svd.evaluate.statistics.intervals import window_estimate

NAME = "kl"
_WINDOW, _PROMPT, _CONTINUED, _BATCH = 512, 32, 64, 4


@dataclass(frozen=True)
class BaseModel:
    """What loads the base model's tokenizer, and all of it."""

    tokenizer: Callable[[], Any]
    subject: Callable[[], Subject]


def job(
    stored: str, origin: str, subject: Subject, base: BaseModel, settings: EvaluateSettings
) -> Job:
    """A job of one record per window. The base model is loaded if something is left to compute.
    Raises MlxSvdError if it tokenizes the text otherwise."""
    length = min(_WINDOW, subject.max_length)
    if length < _PROMPT + _CONTINUED:
        raise MlxSvdError(
            f"kl: needs a context of {_PROMPT + _CONTINUED} tokens; the model has {length}"
        )
    tokens = np.array(_common_tokens(subject, base, detokenized(stored)), dtype=np.int32)
    total = len(tokens) // length
    if not total:
        raise MlxSvdError(f"{origin}: has {len(tokens)} tokens, less than one window of {length}")
    doc_ids = pick(total, settings)
    windows = tokens[: total * length].reshape(total, length)[doc_ids]
    batches = [
        tuple(range(start, min(start + _BATCH, len(doc_ids))))
        for start in range(0, len(doc_ids), _BATCH)
    ]
    loaded: list[Scorer] = []

    def run(number: int) -> list[Record]:
        if not loaded:
            loaded.append(base.subject().scorer)
        part = windows[list(batches[number])]
        models = (subject.scorer.split.model, loaded[0].split.model)
        names = [f"{NAME}: window-{doc_ids[i]}" for i in batches[number]]
        sums, agree, _ = window_divergences(*models, part, names)
        parted = _first_divergence(subject.scorer, loaded[0], part[:, :_PROMPT])
        return [
            {
                "prompt_hash": tokens_hash(window),
                "num_tokens": length - 1,
                "metrics": ["kl", "agreement", "first_divergence"],
                "kl": float(kl) / (length - 1),
                "agreement": float(same) / (length - 1),
                "first_divergence": int(position),
            }
            for window, kl, same, position in zip(part, sums, agree, parted, strict=True)
        ]

    def summarize(records: Sequence[Record]) -> dict[str, Score]:
        ones = np.ones(len(records))

        def score(key: str, better: bool, most: float) -> Score:
            values = np.array([r[key] for r in records])
            return score_of(window_estimate(values, ones, (0, most)), better=better)

        return {
            "kl": score("kl", False, np.inf),
            "agreement": score("agreement", True, 1.0),
            "first_divergence": score("first_divergence", True, _CONTINUED),
        }

    return Job(
        NAME, 1.0, 0, [f"window-{i}" for i in doc_ids], doc_ids, total,
        hashlib.sha256(stored.encode()).hexdigest(), origin, batches, run, summarize,
        numbers(("kl", "agreement", "first_divergence")),
        config={"window": length, "continued": _CONTINUED},
    )  # fmt: skip


def _common_tokens(subject: Subject, base: BaseModel, text: str) -> list[int]:
    tokens = tokens_of(subject.tokenizer, text)
    if tokens_of(base.tokenizer(), text) != tokens:
        raise MlxSvdError(
            "kl: the model and --base tokenize the text differently; compare models of one "
            "tokenizer, or leave out kl"
        )
    return tokens


def _first_divergence(model: Scorer, base: Scorer, prompts: np.ndarray) -> np.ndarray:
    """Tokens that both models' greedy continuations have in common, (N,), at most _CONTINUED.

    As long as the texts are equal, the model's greedy choice is its best token after the base's
    text; so the base's text is all that has to be looked at.
    """
    written = np.array(
        greedy_tokens(base.split, base.mask_axes, prompts.tolist(), _CONTINUED), dtype=np.int32
    )
    tokens = mx.array(np.concatenate([prompts, written], axis=1))
    hidden = model.split.hidden(tokens)[:, prompts.shape[1] - 1 : -1]
    best = mx.argmax(model.split.logits(hidden.reshape(-1, hidden.shape[-1])), axis=-1)
    same = np.array(best).reshape(written.shape) == written
    return np.where(same.all(axis=1), _CONTINUED, same.argmin(axis=1))
