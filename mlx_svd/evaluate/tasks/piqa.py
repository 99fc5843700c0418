"""PIQA (Bisk et al. 2020): which of two ways reaches an everyday goal. Chance 0.5.

Rows: validation split of baber/piqa. Prompt: "Question: ...\\nAnswer:", then " " + solution, as
lm-eval 1.0. Metrics: acc, acc_norm.
"""

from typing import Any

from mlx_svd.evaluate.rows.choice_task import ChoiceTask
from mlx_svd.evaluate.rows.hub import Hub


def from_hub(row: dict[str, Any]) -> dict[str, Any]:
    """baber/piqa -> a local row."""
    return {
        "question": row["goal"],
        "choices": [row["sol1"], row["sol2"]],
        "label": int(row["label"]),
    }


TASK = ChoiceTask(
    name="piqa",
    file="piqa.jsonl",
    hub=Hub("baber/piqa", "*", "validation", shots="train"),
    from_hub=from_hub,
)
