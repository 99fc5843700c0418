"""ARC, the part that word statistics do not solve (Clark et al. 2018). Chance 0.25.

Rows: test split of allenai/ai2_arc, ARC-Challenge. Prompt and metrics as arc_easy.
"""

from mlx_svd.evaluate.rows.choice_task import ChoiceTask
from mlx_svd.evaluate.rows.hub import Hub
from mlx_svd.evaluate.tasks.arc_easy import from_hub

TASK = ChoiceTask(
    name="arc_challenge",
    file="arc_challenge.jsonl",
    hub=Hub("allenai/ai2_arc", "ARC-Challenge", "test", shots="train"),
    from_hub=from_hub,
)
