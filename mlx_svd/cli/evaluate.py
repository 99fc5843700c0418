"""``mlx-svd evaluate``: benchmarks with intervals, on any model that mlx-svd loads."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mlx_svd.cli import options as o


def evaluate(
    model: o.Model,
    tasks: Annotated[
        str,
        typer.Option(help="Comma-separated names, or files of rows (see docs/evaluation.md)."),
    ],
    output_dir: Annotated[Path, typer.Option(help="Folder for samples, results and tables.")],
    revision: o.Revision = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task. Default: all.")] = None,
    random_rows: Annotated[
        bool, typer.Option("--random-rows", help="Draw the rows of --limit by --seed.")
    ] = False,
    num_fewshot: Annotated[int, typer.Option(help="Examples in the prompt.")] = 0,
    seed: Annotated[int, typer.Option(help="Draws examples and rows; lm-eval's default.")] = 1234,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with local rows. Default: the hub.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Model, or folder of its results, to compare with.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts of the generation task. Default: 234 shipped ones.")
    ] = None,
    scoring: Annotated[
        str, typer.Option(help="Generated answers: words, or seed (substrings, for comparison).")
    ] = "words",
    max_length: Annotated[int | None, typer.Option(help="Default: the model's context.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a pass.")] = None,
    dtype: o.Dtype = None,
    json_: o.Json = False,
) -> None:
    """Score a model on tasks. A stopped run continues; mlx.launch shares the work."""
    from mlx_svd.cli.progress import progress
    from mlx_svd.cli.tables import print_scores
    from mlx_svd.evaluate.evaluate import evaluate as run
    from mlx_svd.evaluate.likelihood.batches import BATCH_TOKENS
    from mlx_svd.evaluate.prepare import expanded, task_name
    from mlx_svd.evaluate.processes import Processes
    from mlx_svd.evaluate.settings import EvaluateSettings

    settings = EvaluateSettings(
        limit=limit,
        random_rows=random_rows,
        num_fewshot=num_fewshot,
        seed=seed,
        scoring=scoring,
        max_length=max_length,
        batch_tokens=batch_tokens or BATCH_TOKENS,
        dtype=dtype,
        data_dir=data_dir,
        base=base,
        prompts=prompts,
    )
    names = o.names(tasks)
    shown = [task_name(name) for name in expanded(names)]
    with progress("evaluating", dict.fromkeys(shown, 1.0)) as advance:
        results = run(
            model,
            names,
            output_dir,
            settings,
            revision=revision,
            advance=lambda task, done, total: advance(
                task if done == total else f"{task} {done}/{total}"
            ),
        )
    if not Processes().first:
        return
    if json_:
        print(json.dumps(results, indent=2))
        return
    print_scores(results)
