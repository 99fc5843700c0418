"""Facts: is the true object likelier than every false one, and does the model write it? Chance of
acc: one over the number of objects.

Rows: facts.json ({relation, subject, object, prompt, conflict, distractors}) or known_1000.json
(ROME) in the data folder; on the hub CounterFact (NeelNanda/counterfact-tracing). Prompt: as given,
then " " + object. Metrics: acc, acc_norm (log-probability), exact_match (greedy text, whole words),
with a base model also retained: acc of the facts that the base model has right, and no others.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlx_svd.evaluate.facts import Fact, fact_item, fact_margins
from mlx_svd.evaluate.jobs.base import Base
from mlx_svd.evaluate.jobs.choice_job import Subject, truncation, truncation_notes
from mlx_svd.evaluate.jobs.generated import answers, tokens_cut
from mlx_svd.evaluate.jobs.job import Job, Record, Score, mean_score, numbers
from mlx_svd.evaluate.jobs.matching import matches
from mlx_svd.evaluate.likelihood.encode import encode_items
from mlx_svd.evaluate.rows.material import pick
from mlx_svd.evaluate.settings import EvaluateSettings

NAME = "facts"
METRICS = ("acc", "acc_norm", "exact_match")


def job(
    facts: list[Fact],
    origin: str,
    subject: Subject,
    settings: EvaluateSettings,
    base: Base | None,
    name: str = NAME,
) -> Job:
    """A job of one record per fact: log_likelihoods of the objects, the true one first; margin in
    nats; text: what the model wrote."""
    digest = hashlib.sha256(json.dumps([vars(f) for f in facts]).encode()).hexdigest()
    doc_ids = pick(len(facts), settings)
    chosen = [facts[i] for i in doc_ids]
    asked = replace(settings, num_fewshot=0)
    known = base.records(name, digest, doc_ids, asked, subject.max_length) if base else {}
    items = encode_items(subject.tokenizer, [fact_item(f) for f in chosen], subject.max_length)
    written = tokens_cut(subject, [f.prompt for f in chosen], settings)
    cuts = [max(item.truncated, cut) for item, cut in zip(items, written, strict=True)]
    batches = subject.scorer.batches(items, subject.max_length, settings.batch_tokens)

    def run(number: int) -> list[Record]:
        batch = batches[number]
        scores = subject.scorer.score_batch(items, batch)
        texts = answers(subject, [chosen[i].prompt for i in batch.items], settings)
        records = []
        for i, found, text in zip(batch.items, scores, texts, strict=True):
            fact = chosen[i]
            margin, normalized = fact_margins(fact, found.log_likelihoods)
            record = {
                "target": fact.object,
                "log_likelihoods": found.log_likelihoods.tolist(),
                "margin": margin,
                "text": text,
                "metrics": [*METRICS, "retained"] if base else list(METRICS),
                "acc": float(margin > 0),
                "acc_norm": float(normalized > 0),
                "exact_match": float(matches(text, fact.object, settings.scoring)),
                **truncation(cuts[i]),
            }
            if base:
                # Only what the base model knows can be kept or lost.
                record["retained"] = record["acc"] if known[doc_ids[i]]["acc"] else None
            records.append(record)
        return records

    def summarize(records: Sequence[Record]) -> dict[str, Score]:
        chance = float(np.mean([1 / len(fact.candidates) for fact in chosen]))
        scores = {
            key: mean_score([r[key] for r in records], chance=chance if "acc" in key else None)
            for key in METRICS
        }
        kept = [r["retained"] for r in records if r.get("retained") is not None]
        return scores | ({"retained": mean_score(kept)} if kept else {})

    fields = numbers(METRICS) | ({"retained": int | float | None} if base else {})
    made = Job(
        name, 1.0, 0, [f"{f.relation}: {f.subject}" for f in chosen], doc_ids, len(facts), digest,
        origin, [batch.items for batch in batches], run, summarize,
        fields, notes=truncation_notes(name, cuts, subject.max_length),
    )  # fmt: skip
    made.config = {"scoring": settings.scoring}
    if base and not any(record["acc"] for record in known.values()):
        made.notes.append(f"{name}: the base model has no fact right, so nothing can be retained")
    return made
