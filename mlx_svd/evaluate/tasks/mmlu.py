"""MMLU (Hendrycks et al. 2020): 57 subjects, four lettered choices. Chance 0.25.

Rows: test split of cais/mmlu, all; examples: the first ones of the subject's dev split, as lm-eval
1.0 (its group mmlu weights all questions alike, which is the mean given here). The letter is
scored. Metric: acc.
"""

from dataclasses import replace
from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.rows.choice_task import ChoiceTask, accuracy
from mlx_svd.evaluate.rows.hub import Hub
from mlx_svd.evaluate.rows.read import Row, choice_row

_LETTERS = "ABCD"


def from_hub(row: dict[str, Any]) -> dict[str, Any]:
    """cais/mmlu -> a local row."""
    return {key: row[key] for key in ("question", "subject", "choices")} | {"label": row["answer"]}


def parse(where: str, entry: dict[str, Any], number: int) -> Row:
    """A row with a subject and four choices."""
    row = choice_row(where, entry, number)
    if not row.subject:
        raise MlxSvdError(f'{where} has no text in "subject"')
    if len(row.choices) != len(_LETTERS):
        raise MlxSvdError(f"{where} has {len(row.choices)} choices; MMLU has four")
    # Subjects number their questions independently.
    return replace(row, id=f"{row.subject}/{row.id}")


def prompt(row: Row) -> str:
    """The question and its lettered choices."""
    choices = "".join(f"\n{letter}. {c}" for letter, c in zip(_LETTERS, row.choices, strict=True))
    return f"{row.question.strip()}{choices}\nAnswer:"


def description(row: Row) -> str:
    """lm-eval's first line, with the subject."""
    subject = row.subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


TASK = ChoiceTask(
    name="mmlu",
    file="mmlu.jsonl",
    shots_file="mmlu_dev.jsonl",
    hub=Hub("cais/mmlu", "all", "test", shots="dev"),
    from_hub=from_hub,
    parse=parse,
    prompt=prompt,
    choices=lambda row: _LETTERS,
    description=description,
    metrics=accuracy,
    metric_names=("acc",),
    by_subject=True,
)
