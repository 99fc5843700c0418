"""Row by row: the samples of `mlx-svd evaluate` against lm-eval itself on the same rows.

    PYTHONPATH=. python scripts/lm_eval_agreement.py RESULTS MODEL ROWS --limit 100

RESULTS: a folder of zero-shot results in float32; MODEL: the model; ROWS: the folder of the tasks'
rows (data/mc). lm-eval runs through mlx_lm's own adapter. Prints one line for each task: how many
rows, the largest and the mean difference of a choice's log-likelihood in nats, how many rows have
another acc or acc_norm, and how many were longer than the context and are left out (the adapter
does not cut them). Needs the dev group.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from tests.evaluate import lm_eval_reference as reference


def read_samples(path: Path, count: int) -> list[dict]:
    """The first ``count`` samples by document."""
    lines = [json.loads(line) for line in path.read_text().split("\n") if line]
    return sorted(lines, key=lambda sample: sample["doc_id"])[:count]


def agreement(ours: list[dict], theirs: list[dict]) -> tuple[int, float, float, int, int]:
    """Rows compared, largest and mean difference (nats), rows of another score, rows left out."""
    differences, changed, cut = [], 0, 0
    for mine, other in zip(ours, theirs, strict=True):
        if "truncated" in mine:
            cut += 1
            continue
        values = [float(response[0]) for response in other["filtered_resps"]]
        differences += list(np.abs(np.array(mine["log_likelihoods"]) - values))
        changed += any(abs(mine[m] - other[m]) > 1e-4 for m in mine["metrics"])
    return len(ours) - cut, max(differences), float(np.mean(differences)), changed, cut


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    arguments = parser.parse_args()
    print("| task | rows | largest difference | mean | other scores | left out |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder) / "tasks"
        names = reference.write_tasks(tasks, arguments.rows.resolve(), 0)
        adapter = reference.adapter(arguments.model)
        for name in names:
            task = name.removeprefix("local_")
            samples = arguments.results / f"samples_{task}.jsonl"
            if not samples.is_file():
                continue
            found = reference.run(adapter, tasks, [name], 0, limit=arguments.limit)
            theirs = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
            ours = read_samples(samples, len(theirs))
            rows, largest, mean, changed, cut = agreement(ours, theirs)
            print(
                f"| {task} | {rows} | {largest:.1e} | {mean:.1e} | {changed} | {cut} |", flush=True
            )


if __name__ == "__main__":
    main()
