"""Row by row: the samples of `mlx-svd evaluate` against lm-eval itself on the same rows.

    PYTHONPATH=. python scripts/lm_eval_agreement.py RESULTS MODEL ROWS --limit 100
    PYTHONPATH=. python scripts/lm_eval_agreement.py RESULTS MODEL ROWS --on transformers

RESULTS: a folder of zero-shot results in float32; MODEL: the model; ROWS: the folder of the tasks'
rows (data/mc). lm-eval runs through mlx_lm's own adapter, or its own of transformers. Prints one
line for each task: how many rows, the largest and the mean difference of a choice's log-likelihood
in nats, how many rows have another acc or acc_norm, and how many were longer than the context and
are left out (mlx_lm's adapter does not cut them). Needs the dev group, for transformers the
reference group.
"""

import argparse
import json
import tempfile
from pathlib import Path

from tests.evaluate import lm_eval_reference as reference

ADAPTERS = {"mlx": reference.adapter, "transformers": reference.on_transformers}


def read_samples(path: Path, documents: set[int]) -> list[dict]:
    """The samples of these documents."""
    lines = [json.loads(line) for line in path.read_text().split("\n") if line]
    return [sample for sample in lines if sample["doc_id"] in documents]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--on", choices=list(ADAPTERS), default="mlx")
    arguments = parser.parse_args()
    print("| task | rows | largest difference | mean | other scores | left out |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder) / "tasks"
        names = reference.write_tasks(tasks, arguments.rows.resolve(), 0)
        adapter = ADAPTERS[arguments.on](arguments.model)
        for name in names:
            task = name.removeprefix("local_")
            samples = arguments.results / f"samples_{task}.jsonl"
            if not samples.is_file():
                continue
            found = reference.run(adapter, tasks, [name], 0, limit=arguments.limit)
            theirs = found["samples"][name]
            ours = read_samples(samples, {sample["doc_id"] for sample in theirs})
            a = reference.agreement(ours, theirs)
            print(
                f"| {task} | {a.rows} | {a.largest:.1e} | {a.mean:.1e} | {a.other_scores} "
                f"| {a.left_out} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
