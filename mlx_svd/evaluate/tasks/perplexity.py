"""Perplexity of a text: WikiText-2's test set, or a file of one's own (.txt). No chance level.

Rows: wikitext-2.test.txt in the data folder; on the hub EleutherAI/wikitext_document_level. The
whole text is one document, cut into windows of the model's context in which every token is
predicted once. Metrics as lm-eval's wikitext 2.0: word_perplexity, byte_perplexity, bits_per_byte
(over words and bytes of the text as it is stored, so they compare models of different tokenizers);
and token_perplexity, which does not. Intervals are from the variation between windows.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.jobs.choice_job import Subject
from mlx_svd.evaluate.jobs.job import Job, Record, Score, numbers, score_of
from mlx_svd.evaluate.likelihood.encode import prefix_token, tokens_hash, tokens_of
from mlx_svd.evaluate.likelihood.rolling import rolling_items
from mlx_svd.evaluate.rows.hub import Hub, hub_rows
from mlx_svd.evaluate.rows.material import find_file, pick
from mlx_svd.evaluate.rows.wikitext import count_words, detokenized
from mlx_svd.evaluate.settings import EvaluateSettings
from mlx_svd.evaluate.statistics.intervals import window_estimate
from mlx_svd.source.source import brief

NAME, FILE = "perplexity", "wikitext-2.test.txt"
HUB = Hub("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test")


def read_text(settings: EvaluateSettings) -> tuple[str, str]:
    """(WikiText-2 as it is stored, where it is from)."""
    if settings.data_dir is None:
        return "".join(row["page"] for row in hub_rows(HUB, HUB.split)), HUB.repo
    path = find_file(settings.data_dir, FILE)
    return plain_text(path), path.name


def plain_text(path: Path) -> str:
    """The content of a text file; MlxSvdError if it is empty or no text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MlxSvdError(f"{path}: cannot be read as text: {brief(error)}") from error
    if not text.strip():
        raise MlxSvdError(f"{path}: is empty; give a text")
    return text


def job(
    stored: str, origin: str, subject: Subject, settings: EvaluateSettings, name: str = NAME
) -> Job:
    """A job of one record per window: loglikelihood of its num_tokens tokens. ``limit`` counts
    windows; words and bytes of a part of the text are estimated from its share of the tokens."""
    text = detokenized(stored) if name == NAME else stored
    tokens = tokens_of(subject.tokenizer, text)
    items = rolling_items(name, tokens, prefix_token(subject.tokenizer), subject.max_length)
    total = len(items)
    doc_ids = pick(total, settings)
    items = [items[i] for i in doc_ids]
    batches = subject.scorer.batches(items, subject.max_length, settings.batch_tokens)
    counts = [len(item.pairs[0][1]) for item in items]
    words, size = count_words(stored), len(stored.encode())

    def run(number: int) -> list[Record]:
        batch = batches[number]
        scores = subject.scorer.score_batch(items, batch)
        return [
            {
                "prompt_hash": tokens_hash(items[i].pairs[0][1]),
                "loglikelihood": float(s.log_likelihoods[0]),
                "num_tokens": counts[i],
            }
            for i, s in zip(batch.items, scores, strict=True)
        ]

    def summarize(records: Sequence[Record]) -> dict[str, Score]:
        losses = [-r["loglikelihood"] for r in records]
        scored = np.array([r["num_tokens"] for r in records])
        loss = window_estimate(losses, scored, (0, math.inf))
        per_word, per_byte = len(tokens) / words, len(tokens) / size
        # Per byte of the text as it is stored, of which each token has the same share.
        bits = window_estimate(losses, scored * (math.log(2) / per_byte), (0, math.inf))
        found = {
            "word_perplexity": loss.exponential(per_word),
            "byte_perplexity": loss.exponential(per_byte),
            "token_perplexity": loss.exponential(),
            "bits_per_byte": bits,
        }
        return {name: score_of(each, better=False) for name, each in found.items()}

    return Job(
        name, 2.0, 0, [f"window-{i}" for i in doc_ids], doc_ids, total,
        hashlib.sha256(stored.encode()).hexdigest(), origin, [b.items for b in batches], run,
        summarize, numbers(("loglikelihood", "num_tokens")),
        config={"window": subject.max_length, "words": words, "bytes": size},
    )  # fmt: skip
