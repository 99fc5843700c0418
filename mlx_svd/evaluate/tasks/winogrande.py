"""Winogrande (Sakaguchi et al. 2019): which of two names fills the blank "_". Chance 0.5.

Rows: validation split of allenai/winogrande, winogrande_xl; locally {question with one "_", two
choices, label}. The text up to the blank, with a choice in it, is the prompt; what follows the
blank is scored, as lm-eval 1.0. Metric: acc.
"""

from typing import Any

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.rows.choice_task import ChoiceTask, accuracy
from mlx_svd.evaluate.rows.hub import Hub
from mlx_svd.evaluate.rows.read import Row, choice_row


def from_hub(row: dict[str, Any]) -> dict[str, Any]:
    """allenai/winogrande -> a local row."""
    return {
        "question": row["sentence"],
        "choices": [row["option1"], row["option2"]],
        "label": int(row["answer"]) - 1,
    }


def parse(where: str, entry: dict[str, Any], number: int) -> Row:
    """A row whose question has a blank with a text behind it."""
    row = choice_row(where, entry, number)
    if not row.question.partition("_")[2].strip():
        raise MlxSvdError(f'{where}: "question" has no blank "_" with a text behind it')
    return row


def split(row: Row) -> tuple[list[str], str]:
    """(one prompt for each choice, the text behind the blank)."""
    before, _, rest = row.question.partition("_")
    return [before + choice for choice in row.choices], rest.strip()


TASK = ChoiceTask(
    name="winogrande",
    file="winogrande.jsonl",
    hub=Hub("allenai/winogrande", "winogrande_xl", "validation", shots="train"),
    from_hub=from_hub,
    parse=parse,
    split=split,
    metrics=accuracy,
    metric_names=("acc",),
)
