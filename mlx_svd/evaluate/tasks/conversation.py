"""Perplexity of replies in conversations, given everything said before. No chance level.

Rows: conversations.jsonl in the data folder ({messages: [{role, content}]}); on the hub the test
split of HuggingFaceH4/ultrachat_200k. Only the assistant's words are scored. The prompt is the
model's chat template, or "User: ...\\nAssistant:" for a model without one; the two are not
comparable. Metric: token_perplexity, with an interval from the variation between conversations.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.jobs.choice_job import Subject, truncation, truncation_notes
from mlx_svd.evaluate.jobs.job import Job, Record, Score, numbers, score_of
from mlx_svd.evaluate.likelihood.encode import Item, encode_items
from mlx_svd.evaluate.rows.hub import Hub, hub_rows
from mlx_svd.evaluate.rows.material import find_file, pick
from mlx_svd.evaluate.rows.read import read_jsonl
from mlx_svd.evaluate.settings import EvaluateSettings
from mlx_svd.evaluate.statistics.intervals import window_estimate

NAME, FILE = "conversation", "conversations.jsonl"
HUB = Hub("HuggingFaceH4/ultrachat_200k", "*", "test_sft")
Messages = list[dict[str, str]]


def read(settings: EvaluateSettings) -> tuple[list[tuple[str, Messages]], str]:
    """((where, messages) of every conversation, where all are from)."""
    if settings.data_dir is None:
        rows = hub_rows(HUB, HUB.split)
        return [
            (f"{HUB.repo} row {i}", checked(f"{HUB.repo} row {i}", row))
            for i, row in enumerate(rows)
        ], HUB.repo
    path = find_file(settings.data_dir, FILE)
    return [(where, checked(where, entry)) for where, entry in read_jsonl(path)], path.name


def checked(where: str, entry: dict[str, Any]) -> Messages:
    """The messages of a row. Raises MlxSvdError naming where for what is not a conversation."""
    messages = entry.get("messages")
    if not isinstance(messages, list) or not messages:
        raise MlxSvdError(f'{where} has no list of messages in "messages"; give one')
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) and message[key].strip()
            for key in ("role", "content")
        ):
            raise MlxSvdError(f'{where}: a message lacks a text in "role" or "content"; mend it')
    if not any(m["role"] == "assistant" for m in messages[1:]):
        raise MlxSvdError(
            f"{where}: no reply of the assistant follows another message; leave it out"
        )
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def job(
    conversations: list[tuple[str, Messages]],
    origin: str,
    subject: Subject,
    settings: EvaluateSettings,
) -> Job:
    """A job of one record per conversation: loglikelihood of its num_tokens replied tokens."""
    doc_ids = pick(len(conversations), settings)
    made = [_item(*conversations[i], subject.tokenizer) for i in doc_ids]
    items = encode_items(subject.tokenizer, made, subject.max_length)
    batches = subject.scorer.batches(items, subject.max_length, settings.batch_tokens)

    def run(number: int) -> list[Record]:
        batch = batches[number]
        scores = subject.scorer.score_batch(items, batch)
        return [
            {
                "loglikelihood": float(s.log_likelihoods.sum()),
                "num_tokens": sum(len(after) for _, after in items[i].pairs),
                **truncation(items[i].truncated),
            }
            for i, s in zip(batch.items, scores, strict=True)
        ]

    def summarize(records: Sequence[Record]) -> dict[str, Score]:
        losses = [-r["loglikelihood"] for r in records]
        counts = [r["num_tokens"] for r in records]
        found = window_estimate(losses, counts, (0, math.inf))
        return {"token_perplexity": score_of(found.exponential(), better=False)}

    digest = hashlib.sha256(json.dumps([m for _, m in conversations]).encode()).hexdigest()
    template = "the tokenizer's" if _has_template(subject.tokenizer) else "User: / Assistant:"
    notes = truncation_notes(NAME, [item.truncated for item in items], subject.max_length)
    return Job(
        NAME, 1.0, 0, [f"conversation-{i}" for i in doc_ids], doc_ids, len(conversations), digest,
        origin, [b.items for b in batches], run, summarize,
        numbers(("loglikelihood", "num_tokens")), config={"chat_template": template},
        notes=notes,
    )  # fmt: skip


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "has_chat_template", False))


def _item(where: str, messages: Messages, tokenizer: Any) -> Item:
    """Each reply after everything before it."""
    pairs = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or not number:
            continue
        before = messages[:number]
        if _has_template(tokenizer):
            shown = tokenizer.apply_chat_template(
                before, tokenize=False, add_generation_prompt=True
            )
            pairs.append((shown, message["content"]))
        else:
            lines = [f"{m['role'].capitalize()}: {m['content']}" for m in before]
            pairs.append(("\n".join([*lines, "Assistant:"]), " " + message["content"]))
    return Item(where, tuple(pairs))
