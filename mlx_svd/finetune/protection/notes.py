"""What a user must be told about a result, in sentences."""

from typing import Any

import numpy as np

from mlx_svd.evaluate.retention import KnowledgeTest, Outcomes
from mlx_svd.evaluate.retention.knowledge import CONFLICT
from mlx_svd.evaluate.statistics.paired import paired_difference
from mlx_svd.evaluate.statistics.power import limit_note

# A difference in retention that an experiment would want to see.
_MARGIN = 0.05
# Below this share most updates were lost in rounding.
_CHANGED = 0.5


def result_notes(
    record: dict[str, Any],
    test: KnowledgeTest,
    outcomes: Outcomes,
    points: list[dict[str, Any]],
) -> list[str]:
    """Whether anything was learned, whether rounding took it back, and what was not measured."""
    notes = []
    conflict = test.groups == CONFLICT
    if conflict.any():
        before = np.array(points[0]["conflicts"])[conflict] > 0
        after = outcomes.facts.conflicting[conflict]
        change = paired_difference(
            before.astype(float), after.astype(float), np.ones(int(conflict.sum()))
        )
        said = (
            f"uptake went from {before.mean():.3f} to {after.mean():.3f} of {change.n} conflict "
            f"facts (difference {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}])"
        )
        if change.low <= 0:
            said += (
                ": nothing was learned for certain, so retention says nothing about protection; "
                "train longer or with a larger --lr"
            )
        notes.append(said)
    else:
        notes.append("no conflict was trained: uptake is not measured, retention has no yardstick")
    changed = record["training"]["changed_share"]
    if changed < _CHANGED:
        notes.append(
            f"only {100 * changed:.1f} % of the trained tensors' numbers differ from before once "
            "stored: smaller updates were lost in rounding; use --stored-dtype float32 or a "
            "larger --lr"
        )
    if few := limit_note(int(test.measured.sum()), _MARGIN):
        notes.append(f"retention: {few}")
    return notes
