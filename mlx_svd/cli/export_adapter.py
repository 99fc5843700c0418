"""``mlx-svd export-adapter``: a corrected checkpoint for programs that run no code of ours."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mlx_svd.cli import options as o


def export_adapter(
    model: Annotated[
        str,
        typer.Option(
            "--model", help="Checkpoint with corrected projections: hub id or local folder."
        ),
    ],
    mlx_path: Annotated[
        Path, typer.Option(help="New folder for the two folders model and adapter.")
    ],
    json_: o.Json = False,
) -> None:
    """Split a corrected checkpoint into a stock quantized model and a LoRA adapter, which stock
    mlx-lm loads without trusted code. A killed run continues when repeated."""
    from mlx_svd.checkpoint.adapter import export_adapter as run
    from mlx_svd.conditions import command_line

    done = run(model, mlx_path, command_line())
    if json_:
        print(json.dumps(asdict(done), indent=2, default=str))
        return
    padding = f" ({done.padding_bytes:,} of them zeros)" if done.padding_bytes else ""
    print(f"{done.model}: {done.model_bytes:,} bytes of tensor data, stock mlx-lm")
    print(
        f"{done.adapter}: LoRA adapter, {done.modules} modules of rank {done.rank}, "
        f"{done.adapter_bytes:,} bytes{padding}"
    )
    print(
        f"together {done.model_bytes + done.adapter_bytes:,} bytes, the checkpoint has "
        f"{done.checkpoint_bytes:,}"
    )
    print(f"use: python -m mlx_lm generate --model {done.model} --adapter-path {done.adapter}")
