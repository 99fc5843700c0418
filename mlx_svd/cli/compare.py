"""``mlx-svd compare``: two evaluated models on the same items."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_svd.cli import options as o

# A failed gate is no bad input (2) and no crash (1).
GATE_FAILED = 3


def compare(
    dir_a: Annotated[Path, typer.Argument(help="Results of the base model (mlx-svd evaluate).")],
    dir_b: Annotated[Path, typer.Argument(help="Results of the other model, on the same items.")],
    margin: Annotated[
        float, typer.Option(help="What counts as equal: 0.01 is one point, or 1 % of a perplexity.")
    ] = 0.01,
    metrics: Annotated[
        str | None, typer.Option(help="Only these, comma-separated. Fewer tests, less correction.")
    ] = None,
    gate: Annotated[
        bool, typer.Option("--gate", help="Exit with 3 if B's texts loop more than A's.")
    ] = False,
    gate_margin: Annotated[
        float, typer.Option(help="Rise of the loop rate that the gate allows.")
    ] = 0.05,
    gate_metrics: Annotated[
        str, typer.Option(help="What the gate reads: loop, rep_2, rep_3, rep_4, comma-separated.")
    ] = "loop",
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    output_dir: Annotated[
        Path | None, typer.Option(help="Also write compare.json, compare.md, compare.csv here.")
    ] = None,
    json_: o.Json = False,
) -> None:
    """Paired differences with intervals, corrected tests, equivalence, and what n can show."""
    from mlx_svd.cli.tables import print_comparison
    from mlx_svd.errors import MlxSvdError
    from mlx_svd.evaluate.comparison.compare import compare as run
    from mlx_svd.evaluate.comparison.table import json_text, write_comparison

    chosen = o.names(metrics) if metrics is not None else None
    found = run(
        dir_a,
        dir_b,
        margin=margin,
        metrics=chosen,
        gate_margin=gate_margin,
        gate_metrics=o.names(gate_metrics),
        seed=seed,
    )
    if gate and found.gate is None:
        raise MlxSvdError(
            "--gate: the folders have no generated texts in common; evaluate both with the task "
            "generation"
        )
    if output_dir is not None:
        write_comparison(found, output_dir)
    if json_:
        print(json_text(found), end="")
    else:
        print_comparison(found)
    if gate and found.gate.verdict == "fail":
        raise typer.Exit(GATE_FAILED)
