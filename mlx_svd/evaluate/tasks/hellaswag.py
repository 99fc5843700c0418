"""HellaSwag (Zellers et al. 2019): which of four endings goes on with a text. Chance 0.25.

Rows: validation split of Rowan/hellaswag. Prompt: "activity: text", then " " + ending, as lm-eval
1.0 with the [..] marks of the WikiHow half taken out. Metrics: acc, acc_norm.
"""

import re
from typing import Any

from mlx_svd.evaluate.rows.choice_task import ChoiceTask
from mlx_svd.evaluate.rows.hub import Hub

_MARK = re.compile(r"\[.*?\]")


def cleaned(text: str) -> str:
    """Without WikiHow's marks; a title ends a sentence."""
    without = _MARK.sub("", text.strip().replace(" [title]", ". "))
    return without.replace("  ", " ")


def from_hub(row: dict[str, Any]) -> dict[str, Any]:
    """Rowan/hellaswag -> a local row."""
    text = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "id": f"hellaswag-{row['ind']}",
        "question": cleaned(text),
        "choices": [cleaned(ending) for ending in row["endings"]],
        "label": int(row["label"]),
    }


TASK = ChoiceTask(
    name="hellaswag",
    file="hellaswag.jsonl",
    hub=Hub("Rowan/hellaswag", "*", "validation", shots="train"),
    from_hub=from_hub,
    prompt=lambda row: row.question,
)
