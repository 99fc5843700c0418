"""``mlx-svd demo``: the whole job in a minute, without a model hub."""

import platform
import tempfile
from pathlib import Path
from typing import Annotated

import typer


def demo(
    keep: Annotated[
        Path | None, typer.Option(help="Keep the checkpoints in this new folder.")
    ] = None,
) -> None:
    """Plan, compress, load, score and generate with an embedded 6.5M-parameter model."""
    from mlx_svd.errors import MlxSvdError

    if keep is None:
        with tempfile.TemporaryDirectory(prefix="mlx-svd-demo-") as folder:
            _run(Path(folder))
        return
    if keep.exists():
        raise MlxSvdError(f"{keep}: exists already; delete it or give another --keep")
    _run(keep)
    print(f"checkpoints: {keep}")


def _run(folder: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from mlx_svd.cli.tables import console, print_plan, share, size
    from mlx_svd.demo import demo as run
    from mlx_svd.demo.run import PROMPT, demo_plan

    out = console()
    out.print("Plan: mlx-svd plan --model <embedded> --rank-ratio 0.7\n")
    print_plan(demo_plan()[1])
    # Half precision is slow on Linux's CPU backend.
    dtype = None if platform.system() == "Darwin" else "float32"
    rows = []
    for row in run(folder, dtype):
        rows.append(row)
        out.print(f"\n[bold]{row.name}[/bold]: {PROMPT} [italic]{escape(row.text)}[/italic]")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model")
    for name in ("bytes", "of whole", "of touched", "perplexity", "95 % interval", "tokens/s"):
        table.add_column(name, justify="right")
    for row in rows:
        p = row.perplexity
        table.add_row(
            row.name,
            size(row.nbytes),
            share(row.nbytes, rows[0].nbytes),
            share(row.touched_after, row.touched_before),
            f"{p.perplexity:.2f}",
            f"{p.low:.1f}-{p.high:.1f}",
            f"{row.generation_tps:.0f}",
        )
    out.print()
    out.print(table)
    out.print(
        f"\nPerplexity on {rows[0].perplexity.tokens} tokens written for this demo: the rows share "
        "them, so compare rows, not intervals.\nSpeeds are of this machine, run "
        f"{'as stored' if dtype is None else 'in float32, quantized rows on an unoptimized path'}."
    )
