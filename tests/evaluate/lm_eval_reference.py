"""lm-eval itself on local files of rows, through mlx_lm's own adapter or on transformers.

The task files say of local rows what lm-eval's own task files say of the rows on the hub.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import yaml
from mlx.utils import tree_map

_QUESTION = "Question: {{question}}\nAnswer:"
_BOTH, _ACC = ("acc", "acc_norm"), ("acc",)
_LETTERS = "{{question.strip()}}" + "".join(
    f"\n{letter}. {{{{choices[{k}]}}}}" for k, letter in enumerate("ABCD")
)
# name -> file, prompt, metrics, what differs from the others
TASKS: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    "hellaswag": ("hellaswag", "{{question}}", _BOTH, {}),
    "arc_easy": ("arc_easy", _QUESTION, _BOTH, {}),
    "arc_challenge": ("arc_challenge", _QUESTION, _BOTH, {}),
    "piqa": ("piqa", _QUESTION, _BOTH, {}),
    "mmlu": (
        "mmlu",
        _LETTERS + "\nAnswer:",
        _ACC,
        {
            "doc_to_choice": ["A", "B", "C", "D"],
            "fewshot_config": {"sampler": "first_n"},
            "description": "The following are multiple choice questions (with answers) about "
            "{{subject.replace('_', ' ')}}.\n\n",
        },
    ),
    "winogrande": (
        "winogrande",
        "label",
        _ACC,
        {
            "doc_to_choice": "{{[question.split('_')[0] + choices[0], "
            "question.split('_')[0] + choices[1]]}}",
            "doc_to_text": "{{label}}",
            "doc_to_target": "{{question.split('_')[1].strip()}}",
        },
    ),
}


def write_tasks(folder: Path, data: Path, shots: int) -> list[str]:
    """Task files for the rows in ``data``; returns lm-eval's names, which get the prefix local_."""
    folder.mkdir()
    names = []
    for name, (file, prompt, metrics, more) in TASKS.items():
        path = data / f"{file}.jsonl"
        if not path.is_file():
            continue
        files, split = {"test": str(path)}, "test"
        if (data / f"{file}_dev.jsonl").is_file():
            files, split = {**files, "dev": str(data / f"{file}_dev.jsonl")}, "dev"
        config = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "output_type": "multiple_choice",
            "test_split": "test",
            "fewshot_split": split,
            "doc_to_text": prompt,
            "doc_to_target": "label",
            "doc_to_choice": "choices",
            "metric_list": [
                {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics
            ],
            **more,
        }
        (folder / f"local_{name}.yaml").write_text(yaml.safe_dump(config))
        names.append(f"local_{name}")
    path = data / "truthfulqa_mc.jsonl"
    if path.is_file() and not shots:
        names += _write_truthfulqa(folder, path)
    return names


def _write_truthfulqa(folder: Path, path: Path) -> list[str]:
    """lm-eval's own files, with other rows."""
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).with_name("truthfulqa")
    for kind in ("mc1", "mc2"):
        (folder / f"local_truthfulqa_{kind}.yaml").write_text(
            f"include: {own / f'truthfulqa_{kind}.yaml'}\n"
            f"task: local_truthfulqa_{kind}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{validation: {path}}}}}\n"
        )
    return ["local_truthfulqa_mc1", "local_truthfulqa_mc2"]


def adapter(model: Path) -> Any:
    """mlx_lm's adapter for lm-eval, the model in float32."""
    from mlx_lm.evaluate import MLXLM

    lm = MLXLM(str(model))
    lm._model.update(
        tree_map(
            lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p,
            lm._model.parameters(),
        )
    )
    mx.eval(lm._model.parameters())
    return lm


def on_transformers(model: Path) -> Any:
    """lm-eval's own adapter of transformers, float32 on the CPU. Needs the reference group."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=8)


def run(
    lm: Any,
    folder: Path,
    names: list[str],
    shots: int,
    seed: int = 1234,
    limit: int | None = None,
) -> dict[str, Any]:
    """What lm_eval.simple_evaluate returns, with the samples. limit: rows of a task."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model=lm,
        tasks=names,
        num_fewshot=shots,
        limit=limit,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        fewshot_random_seed=seed,
        log_samples=True,
        bootstrap_iters=0,
        verbosity="ERROR",
    )


@dataclass(frozen=True)
class Agreement:
    """Of the rows that fit into the context: how many; largest and mean difference of a choice's
    log-likelihood, nats; how many of them have another score. left_out: rows that do not fit."""

    rows: int
    largest: float
    mean: float
    other_scores: int
    left_out: int


def agreement(ours: Sequence[dict], theirs: Sequence[dict]) -> Agreement:
    """Of the samples of ``mlx-svd evaluate`` with lm-eval's, both of one task, in any order."""
    ours, theirs = (sorted(rows, key=lambda row: row["doc_id"]) for rows in (ours, theirs))
    differences, other_scores, left_out = [], 0, 0
    for mine, other in zip(ours, theirs, strict=True):
        # mlx_lm's adapter does not cut them.
        if "truncated" in mine:
            left_out += 1
            continue
        values = [float(response[0]) for response in other["filtered_resps"]]
        differences += list(np.abs(np.subtract(mine["log_likelihoods"], values)))
        other_scores += not all(abs(mine[m] - other[m]) <= 1e-4 for m in mine["metrics"])
    # Unlike max, these do not lose a NaN.
    largest, mean = float(np.max(differences)), float(np.mean(differences))
    return Agreement(len(ours) - left_out, largest, mean, other_scores, left_out)


def trim(source: Path, target: Path, count: int, subjects: tuple[str, ...]) -> Path:
    """A data folder with the first ``count`` rows of every task, MMLU of some subjects."""
    target.mkdir()

    def lines(name: str) -> list[str]:
        # JSON strings may hold separators that splitlines knows.
        return [line for line in (source / f"{name}.jsonl").read_text().split("\n") if line]

    for name in ("hellaswag", "arc_easy", "arc_challenge", "piqa", "truthfulqa_mc"):
        (target / f"{name}.jsonl").write_text("\n".join(lines(name)[:count]) + "\n")
    for name, kept in (("mmlu", count), ("mmlu_dev", 5)):
        chosen = [line for s in subjects for line in _of_subject(lines(name), s)[:kept]]
        (target / f"{name}.jsonl").write_text("\n".join(chosen) + "\n")
    return target


def _of_subject(lines: list[str], subject: str) -> list[str]:
    return [line for line in lines if json.loads(line)["subject"] == subject]
