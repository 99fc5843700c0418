"""``mlx-svd sweep-kv``: caches compared at equal bytes per token."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mlx_svd.cli import options as o


def sweep_kv(
    model: o.Model,
    kv_bases: Annotated[Path, typer.Option(help="File made by mlx-svd kv-bases.")],
    heldout: Annotated[str, typer.Option(help="Text to score: file or hub data set.")],
    output: Annotated[Path, typer.Option(help="Folder for records and the table.")],
    arm: Annotated[
        list[str] | None,
        typer.Option(help="q8, q4, lowrank:..., mla:... (docs/kv-cache.md); repeat it."),
    ] = None,
    windows: Annotated[int, typer.Option(min=2, help="Windows of the text.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 1024,
    plot: Annotated[Path | None, typer.Option(help="Picture (.png, .svg, .pdf).")] = None,
    json_: o.Json = False,
) -> None:
    """Perplexity, divergence and measured bytes of KV caches. A stopped sweep continues."""
    from mlx_svd.checkpoint.disk import replace_file
    from mlx_svd.cli.tables import console, progress_console
    from mlx_svd.experiments.kv_sweep import kv_table
    from mlx_svd.experiments.kv_sweep import sweep_kv as run
    from mlx_svd.kv.arms import DEFAULT_ARMS
    from mlx_svd.report.figure import check_plot_path

    if plot is not None:
        check_plot_path(plot)
    err = progress_console()
    records = run(
        model,
        kv_bases,
        heldout,
        output,
        list(arm or DEFAULT_ARMS),
        windows=windows,
        length=length,
        advance=lambda name, done, arms: err.print(f"[{done + 1}/{arms}] {name}", markup=False),
    )
    table = kv_table(records)
    replace_file(output / "table.md", table.encode())
    replace_file(output / "table.json", json.dumps(records, indent=2).encode())
    if plot is not None:
        from mlx_svd.report.kv_quality import plot_kv_quality

        plot_kv_quality(output / "table.json", plot)
    if json_:
        print(json.dumps(records, indent=2))
        return
    console().print(table, markup=False, soft_wrap=True)
