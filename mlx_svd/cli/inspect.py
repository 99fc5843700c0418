"""``mlx-svd inspect``: what a checkpoint holds."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from mlx_svd.cli import options as o


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of an mlx-svd checkpoint.")],
    json_: o.Json = False,
) -> None:
    """Print form, rank, energy kept, weight error and bytes of every projection."""
    from mlx_svd.checkpoint.inspect import inspect as run

    inspection = run(checkpoint)
    if json_:
        print(json.dumps(asdict(inspection), indent=2))
        return
    from mlx_svd.cli.tables import print_inspection

    print_inspection(inspection)
