"""What a model writes after many prompts, and how much of it repeats itself. No chance level.

Prompts: shipped with the package, or a file (--prompts). Metrics of greedy and of sampled texts:
rep_2 to rep_4, loop, length, ended, distinct_1 to distinct_3; see ``evaluate.generation``.
"""

from collections.abc import Sequence

from mlx_svd.evaluate.generation.prompts import SHIPPED_PROMPTS, Prompt, prompts_digest
from mlx_svd.evaluate.generation.quality import (
    TASK,
    GenerationSettings,
    generation_records,
    generation_texts,
    prompt_cuts,
)
from mlx_svd.evaluate.generation.summary import QUALITY_METRICS, generation_summary
from mlx_svd.evaluate.jobs.choice_job import Subject, truncation, truncation_notes
from mlx_svd.evaluate.jobs.job import Job, Record, Score, score_of
from mlx_svd.evaluate.rows.material import pick
from mlx_svd.evaluate.settings import EvaluateSettings

NAME = TASK
# rep-n is None for a text of fewer than n tokens.
_FIELDS = {
    **dict.fromkeys(QUALITY_METRICS, int | float | None),
    "tokens": list,
    "filter": str,
    "id": str,
}


def job(every: Sequence[Prompt], subject: Subject, settings: EvaluateSettings) -> Job:
    """A job of one record per text: every prompt greedily, and sampled with the seed."""
    prompts = [every[i] for i in pick(len(every), settings)]
    # No chat template, as in the other tasks.
    generation = GenerationSettings(
        seeds=(settings.seed,), chat=False, max_length=subject.max_length
    )
    cuts = prompt_cuts(subject.tokenizer, prompts, generation)
    texts = generation_texts(prompts, generation)
    flat = [text for batch in texts for text in batch]
    batches, end = [], 0
    for batch in texts:
        batches.append(tuple(range(end, end + len(batch))))
        end += len(batch)

    def run(number: int) -> list[Record]:
        model = subject.scorer.split.model
        records = generation_records(model, subject.tokenizer, texts[number], generation)
        lost = [truncation(cuts[text.number]) for text in texts[number]]
        return [record | cut for record, cut in zip(records, lost, strict=True)]

    def summarize(records: Sequence[Record]) -> dict[str, Score]:
        found = generation_summary(records)
        return {name: score_of(e, better=_better(name)) for name, e in found.items()}

    return Job(
        NAME, 1.0, 0, [text.prompt.id for text in flat], [text.doc_id for text in flat],
        2 * len(every), prompts_digest(prompts), (settings.prompts or SHIPPED_PROMPTS).name,
        batches, run, summarize, _FIELDS, config={"max_tokens": generation.max_tokens},
        notes=truncation_notes(NAME, cuts, subject.max_length),
    )  # fmt: skip


def _better(name: str) -> bool | None:
    """More different n-grams are better; the other metrics know their direction."""
    metric = name.partition(",")[0]
    return QUALITY_METRICS.get(metric, True)
