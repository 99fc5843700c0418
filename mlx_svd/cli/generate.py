"""``mlx-svd generate``: text from a checkpoint or from an uncompressed model."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from mlx_svd.cli import options as o


def generate(
    model: o.Model,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text to continue; - reads standard input.")
    ],
    revision: o.Revision = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", min=1)] = 256,
    temp: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: int = 0,
    ignore_chat_template: Annotated[bool, typer.Option("--ignore-chat-template")] = False,
    dtype: o.Dtype = None,
    json_: o.Json = False,
) -> None:
    """Generate with mlx-lm. No code from the checkpoint is run."""
    from mlx_svd.checkpoint.loader import load
    from mlx_svd.errors import MlxSvdError
    from mlx_svd.evaluate.generation.generate import generate as run

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise MlxSvdError("--prompt: is empty; give a text to continue")
    loaded, tokenizer = load(model, revision=revision, dtype=dtype)
    result = run(
        loaded,
        tokenizer,
        text,
        max_tokens=max_tokens,
        temp=temp,
        top_p=top_p,
        seed=seed,
        chat=not ignore_chat_template,
        write=(lambda piece: None) if json_ else _write,
    )
    if json_:
        print(json.dumps(asdict(result), indent=2))
        return
    print()
    print(
        f"prompt {result.prompt_tokens} tokens, {result.prompt_tps:.1f} tokens/s; generated "
        f"{result.generation_tokens} tokens, {result.generation_tps:.1f} tokens/s; "
        f"peak memory {result.peak_memory:.3f} GB",
        file=sys.stderr,
    )


def _write(piece: str) -> None:
    print(piece, end="", flush=True)
