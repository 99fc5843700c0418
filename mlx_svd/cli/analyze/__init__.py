"""``mlx-svd analyze``: spectrum, layers, cliff and depth; results as JSON, tables and plots."""

import typer

from mlx_svd.cli.analyze.cliff import cliff
from mlx_svd.cli.analyze.depth import depth
from mlx_svd.cli.analyze.layers import layers
from mlx_svd.cli.analyze.spectrum import spectrum

analyze = typer.Typer(
    name="analyze",
    help="Where a model loses quality when ranks are cut: spectra, projections, ranks, depth.",
    no_args_is_help=True,
)
for command in (spectrum, layers, cliff, depth):
    analyze.command()(command)

__all__ = ["analyze"]
