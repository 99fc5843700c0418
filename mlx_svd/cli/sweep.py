"""``mlx-svd sweep``: method x budget x bits, and mlx-lm's quantizers, in one table."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mlx_svd.cli import options as o


def sweep(
    model: o.Model,
    config: Annotated[Path, typer.Option(help="Sweep file (YAML), see configs/sweeps.")],
    output: Annotated[Path, typer.Option(help="Folder for records, tables and calibration.")],
    data_dir: Annotated[Path, typer.Option(help="Folder that the file's paths start from.")] = Path(
        "."
    ),
    json_: o.Json = False,
) -> None:
    """Compare methods and mlx-lm's quantizers at equal bytes. A stopped sweep continues."""
    from mlx_svd.cli.tables import console, progress_console
    from mlx_svd.experiments.sweep import sweep as run
    from mlx_svd.experiments.sweep_config import load_sweep_config
    from mlx_svd.experiments.sweep_table import markdown, write_tables

    err = progress_console()
    records = run(
        model,
        load_sweep_config(config),
        output,
        data_dir,
        lambda row, done, rows: err.print(f"[{done + 1}/{rows}] {row}", markup=False),
    )
    write_tables(records, output)
    if json_:
        print(json.dumps(records, indent=2))
        return
    console().print(markdown(records), markup=False, soft_wrap=True)
