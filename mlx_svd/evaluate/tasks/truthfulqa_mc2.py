"""TruthfulQA with several right choices (Lin et al. 2021). Chance: the share of right choices.

Rows and prompt as truthfulqa_mc1. Metric: acc, the probability of the right choices among all, as
lm-eval 3.0. Damage moves it towards that chance level from below as well as from above, so a rise
alone is no improvement.
"""

from functools import partial

import numpy as np

from mlx_svd.evaluate.rows.choice_task import ChoiceTask
from mlx_svd.evaluate.rows.read import Row, targets_row
from mlx_svd.evaluate.tasks.truthfulqa_mc1 import FILE, HUB, prompt


def metrics(row: Row, log_likelihoods: np.ndarray) -> dict[str, float]:
    """acc: probability of the right choices over that of all."""
    # Relative to the likeliest: long choices have probabilities below the smallest float.
    weights = np.exp(log_likelihoods - log_likelihoods.max())
    return {"acc": float(weights[np.array(row.labels) == 1].sum() / weights.sum())}


TASK = ChoiceTask(
    name="truthfulqa_mc2",
    file=FILE,
    hub=HUB,
    parse=partial(targets_row, field="mc2_targets"),
    prompt=prompt,
    metrics=metrics,
    metric_names=("acc",),
    chance=lambda row: sum(row.labels) / len(row.labels),
    version=3.0,
    fixed_shots=0,
)
