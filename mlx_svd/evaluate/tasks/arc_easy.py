"""ARC, the easy part (Clark et al. 2018): school science, mostly four choices. Chance 0.25.

Rows: test split of allenai/ai2_arc, ARC-Easy. Prompt: "Question: ...\\nAnswer:", then " " + choice,
as lm-eval 1.0. Metrics: acc, acc_norm.
"""

from typing import Any

from mlx_svd.evaluate.rows.choice_task import ChoiceTask
from mlx_svd.evaluate.rows.hub import Hub


def from_hub(row: dict[str, Any]) -> dict[str, Any]:
    """allenai/ai2_arc -> a local row; labels there are A to E or 1 to 5."""
    return {
        "id": row["id"],
        "question": row["question"],
        "choices": list(row["choices"]["text"]),
        "label": list(row["choices"]["label"]).index(row["answerKey"]),
    }


TASK = ChoiceTask(
    name="arc_easy",
    file="arc_easy.jsonl",
    hub=Hub("allenai/ai2_arc", "ARC-Easy", "test", shots="train"),
    from_hub=from_hub,
)
