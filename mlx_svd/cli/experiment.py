"""``mlx-svd experiment``: run a matrix of conditions x seeds, and print its table."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mlx_svd.cli import options as o

experiment = typer.Typer(
    name="experiment",
    help="Conditions x seeds, one record each, and a table with intervals and paired tests.",
    no_args_is_help=True,
)

_Data = Annotated[
    Path, typer.Option(help="Folder that the file's paths (models, texts, facts) start from.")
]
_Output = Annotated[
    Path,
    typer.Option(help="Folder for all experiments; this one's records go into OUTPUT/NAME."),
]
_Seeds = Annotated[int | None, typer.Option(help="Only so many of the file's seeds.")]
_Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Facts, windows of a text and rows of a task at most: a quick look."),
]


@experiment.command()
def run(
    config: Annotated[Path, typer.Argument(help="Experiment file (YAML), configs/experiments.")],
    data_dir: _Data = Path("."),
    output: _Output = Path("experiments"),
    model: Annotated[
        str | None, typer.Option(help="In place of the file's model, where it has one for all.")
    ] = None,
    seeds: _Seeds = None,
    limit: _Limit = None,
    workers: Annotated[
        int, typer.Option(help="Processes that share the runs, each with its own models.")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what is left and what it will cost.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture of the primary metric: .png, .svg or .pdf (matplotlib extra)."),
    ] = None,
    json_: o.Json = False,
) -> None:
    """Run what is missing of an experiment, then print the table. A stopped run continues."""
    from mlx_svd.cli.tables import console, progress_console
    from mlx_svd.experiments.matrix.config import load_experiment
    from mlx_svd.experiments.matrix.places import Places
    from mlx_svd.experiments.matrix.run import experiment_status, run_experiment
    from mlx_svd.experiments.matrix.table import markdown, write_tables
    from mlx_svd.report.experiment_figure import plot_experiment
    from mlx_svd.report.figure import check_plot_path

    if plot is not None:
        check_plot_path(plot)
    chosen = load_experiment(config)
    folder = output / chosen.name
    places = Places(data_dir, output / "shared", model, limit)
    if dry_run:
        _print_cost(chosen, experiment_status(chosen, folder, places, seeds), json_)
        return
    err = progress_console()
    results = run_experiment(
        chosen,
        folder,
        places,
        seeds=seeds,
        workers=workers,
        advance=lambda label, done, total: err.print(f"[{done}/{total}] {label}", markup=False),
    )
    write_tables(results, folder)
    for failed in results["failed"]:
        err.print(f"{failed['condition']}: no result: {failed['reason']}", markup=False)
    if plot is not None:
        plot_experiment(json.loads((folder / "results.json").read_bytes()), plot)
    if json_:
        print(json.dumps(results, indent=2))
        return
    console().print(markdown(results), markup=False, soft_wrap=True)


def _print_cost(experiment, status, json_: bool) -> None:
    """What a run would do."""
    from mlx_svd.cli.tables import console

    total, left = len(status.jobs), len(status.missing)
    if json_:
        found = {
            "experiment": experiment.name,
            "conditions": len(experiment.conditions),
            "runs": total,
            "left": left,
            "seconds": status.seconds,
            "guessed_runs": status.guessed,
            "missing": [job.label for job in status.missing],
        }
        print(json.dumps(found, indent=2))
        return
    out = console()
    for job in status.missing:
        out.print(job.label, markup=False)
    cost = "unknown (no record yet)"
    if status.seconds is not None:
        cost = f"about {status.seconds:.0f} s in one process"
        if status.guessed:
            cost += f", {status.guessed} of the runs by the file's own guess"
    out.print(
        f"{experiment.name}: {len(experiment.conditions)} conditions, {total} runs, {left} left, "
        f"{cost}",
        markup=False,
    )
