"""``mlx-svd kv-bases``: what low-rank KV caches are made from."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mlx_svd.cli import options as o


def kv_bases(
    model: o.Model,
    output: Annotated[Path, typer.Option(help="File to write (.safetensors).")],
    text: o.Text = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 24,
    length: Annotated[
        int,
        typer.Option(
            min=2, help="Tokens a window; rotated keys need windows as long as their use."
        ),
    ] = 1024,
    revision: o.Revision = None,
    dtype: Annotated[str, typer.Option(help="Of the forward passes.")] = "float32",
    json_: o.Json = False,
) -> None:
    """Measure keys, values and queries on a text, for generate --kv-bases and sweep-kv."""
    from mlx_svd.cli.progress import progress
    from mlx_svd.cli.tables import size
    from mlx_svd.kv.bases import kv_bases as run
    from mlx_svd.kv.bases import too_few_tokens

    with progress("measuring", {str(n): 1.0 for n in range(windows)}) as advance:
        bases = run(
            model,
            output,
            text=text,
            windows=windows,
            length=length,
            revision=revision,
            dtype=dtype,
            advance=advance,
        )
    info = bases.info
    if json_:
        print(json.dumps(asdict(info), indent=2))
        return
    if info.windows < windows:
        print(f"{info.origin}: has only {info.windows} windows of {length} tokens, not {windows}")
    print(
        f"{output}: {len(bases.layers)} layers of {info.model}, {info.windows * info.length:,} "
        f"tokens of {info.origin}, {size(output.stat().st_size)}"
    )
    if warning := too_few_tokens(bases):
        print(f"warning: {warning}")
