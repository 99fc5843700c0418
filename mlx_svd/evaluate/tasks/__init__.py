"""The tasks that need no file of one's own, by name."""

from difflib import get_close_matches

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.rows.choice_task import ChoiceTask
from mlx_svd.evaluate.tasks import (
    arc_challenge,
    arc_easy,
    composite,
    conversation,
    facts,
    generation,
    hellaswag,
    kl,
    mmlu,
    perplexity,
    piqa,
    reasoning,
    truthfulqa_mc1,
    truthfulqa_mc2,
    winogrande,
)

CHOICE_TASKS: dict[str, ChoiceTask] = {
    module.TASK.name: module.TASK
    for module in (
        hellaswag,
        arc_easy,
        arc_challenge,
        truthfulqa_mc1,
        truthfulqa_mc2,
        mmlu,
        piqa,
        winogrande,
    )
}
OTHER_TASKS = tuple(
    m.NAME for m in (facts, reasoning, composite, perplexity, conversation, kl, generation)
)
TASK_NAMES = (*CHOICE_TASKS, *OTHER_TASKS)


def check_name(name: str) -> None:
    """Raise MlxSvdError that offers the nearest names for one that is no task."""
    if name in TASK_NAMES:
        return
    near = get_close_matches(name, TASK_NAMES, n=3, cutoff=0.5) or TASK_NAMES
    raise MlxSvdError(
        f"{name}: no such task and no such file; use {', '.join(near)}, or a file with rows "
        "(.jsonl)"
    )
