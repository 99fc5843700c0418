"""Reasoning in one step: sums, sequences, comparisons, opposites of order. No chance level.

A stand-in for the seed documents' handful of reasoning questions, which were never published: 120
prompts made from a fixed seed, so nothing is downloaded. The model writes; metric: exact_match of
the answer as a whole word (--scoring seed: as a substring, which "1" passes in "10").
"""

import hashlib
import json
import random
from collections.abc import Sequence

from mlx_svd.evaluate.jobs.choice_job import Subject, truncation, truncation_notes
from mlx_svd.evaluate.jobs.generated import answers, tokens_cut
from mlx_svd.evaluate.jobs.job import Job, Record, Score, mean_score, numbers
from mlx_svd.evaluate.jobs.matching import matches
from mlx_svd.evaluate.rows.material import pick
from mlx_svd.evaluate.settings import EvaluateSettings

NAME = "reasoning"
_SEED, _EACH, _BATCH = 4, 30, 40
_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry")
_RELATIONS = (("taller", "tallest"), ("older", "oldest"), ("faster", "fastest"))
_NOUNS = ("apples", "coins", "books", "eggs")


def questions() -> list[tuple[str, str]]:
    """(prompt, answer), always the same ones."""
    generator, made = random.Random(_SEED), []
    for _ in range(_EACH):
        a, b = generator.randint(2, 20), generator.randint(2, 20)
        noun, name = generator.choice(_NOUNS), generator.choice(_NAMES)
        sentence = f"{name} has {a} {noun} and gets {b} more. The number of {noun} is now"
        made.append((sentence, str(a + b)))
        start, step = generator.randint(1, 9), generator.randint(2, 9)
        shown = ", ".join(str(start + step * k) for k in range(4))
        made.append((f"The next number after {shown} is", str(start + 4 * step)))
        one, two, three = generator.sample(_NAMES, 3)
        more, most = generator.choice(_RELATIONS)
        told = f"{one} is {more} than {two}. {two} is {more} than {three}."
        made.append((f"{told} The {most} of the three is", one))
        day = generator.randrange(7)
        days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
        made.append((f"If today is {days[day]}, then tomorrow is", days[(day + 1) % 7]))
    return made


def job(subject: Subject, settings: EvaluateSettings) -> Job:
    """A job of one record per question, with the text that the model wrote."""
    every = questions()
    doc_ids = pick(len(every), settings)
    cuts = tokens_cut(subject, [every[i][0] for i in doc_ids], settings)
    batches = [
        tuple(range(start, min(start + _BATCH, len(doc_ids))))
        for start in range(0, len(doc_ids), _BATCH)
    ]

    def run(number: int) -> list[Record]:
        asked = [every[doc_ids[i]] for i in batches[number]]
        texts = answers(subject, [prompt for prompt, _ in asked], settings)
        return [
            {
                "target": answer,
                "text": text,
                "metrics": ["exact_match"],
                "exact_match": float(matches(text, answer, settings.scoring)),
                **truncation(cuts[i]),
            }
            for i, (_, answer), text in zip(batches[number], asked, texts, strict=True)
        ]

    def summarize(records: Sequence[Record]) -> dict[str, Score]:
        return {"exact_match": mean_score([r["exact_match"] for r in records])}

    digest = hashlib.sha256(json.dumps(every).encode()).hexdigest()
    return Job(
        NAME, 1.0, 0, [f"reasoning-{i}" for i in doc_ids], doc_ids, len(every), digest,
        "made from a seed", batches, run, summarize, numbers(("exact_match",)),
        config={"scoring": settings.scoring},
        notes=truncation_notes(NAME, cuts, subject.max_length),
    )  # fmt: skip
