"""``mlx-svd generate``: text from a checkpoint or from an uncompressed model."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mlx_svd.cli import options as o

_CACHE = "KV cache (docs/kv-cache.md)"


def _kv(text: str, *names: str, **limits):
    return typer.Option(*names, help=text, rich_help_panel=_CACHE, **limits)


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
    kv_bases: Annotated[
        Path | None, _kv("File of mlx-svd kv-bases: cache latents of keys and values.")
    ] = None,
    kv_rank: Annotated[int | None, _kv("Numbers kept per key-value head.")] = None,
    kv_energy: Annotated[float | None, _kv("Share of the energy to keep.")] = None,
    kv_bytes_per_token: Annotated[float | None, _kv("Of all layers.")] = None,
    kv_bits: Annotated[int | None, _kv("8 or 4; without bases: mlx-lm's own.")] = None,
    kv_group_size: Annotated[int, _kv("Of quantization: 32, 64 or 128.")] = 64,
    kv_group: Annotated[str, _kv("Heads that share a latent: a number, or all.")] = "1",
    kv_keys: Annotated[str, _kv("Basis of keys: kq, joint or pca.")] = "kq",
    kv_values: Annotated[str, _kv("Basis of values: output or pca.")] = "output",
    kv_fold: Annotated[bool, _kv("Put the values' basis into the weights.", "--kv-fold")] = False,
    prompt_cache_file: Annotated[
        Path | None, _kv("Continue after the text of this file (--kv-bases).")
    ] = None,
    save_prompt_cache: Annotated[
        Path | None, _kv("Keep the caches of prompt and answer (--kv-bases).")
    ] = None,
    json_: o.Json = False,
) -> None:
    """Generate with mlx-lm. No code from the checkpoint is run."""
    from mlx_svd.checkpoint.loader import load
    from mlx_svd.errors import MlxSvdError
    from mlx_svd.evaluate.generation.generate import generate as run
    from mlx_svd.kv.session import open_session, quantized_session
    from mlx_svd.kv.settings import KVSettings
    from mlx_svd.source.resolve import CHECKPOINT_PATTERNS, resolve_model

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise MlxSvdError("--prompt: is empty; give a text to continue")
    settings = KVSettings(
        keys=kv_keys,
        values=kv_values,
        heads_per_group=_heads(kv_group),
        rank=kv_rank,
        energy=kv_energy,
        bytes_per_token=kv_bytes_per_token,
        bits=kv_bits,
        group_size=kv_group_size,
        fold=kv_fold,
    )
    plain = KVSettings(bits=kv_bits, group_size=kv_group_size)
    if kv_bases is None and (settings != plain or prompt_cache_file or save_prompt_cache):
        raise MlxSvdError(
            "--kv-bases: is needed by the other --kv options and prompt-cache files; make one with "
            "mlx-svd kv-bases"
        )
    folder = resolve_model(model, revision, CHECKPOINT_PATTERNS).path
    loaded, tokenizer = load(folder, dtype=dtype)
    session = caches = None
    if kv_bases is not None:
        session = open_session(loaded, folder, kv_bases, settings, prompt_cache_file)
        caches = session.caches
    elif kv_bits is not None:
        caches = quantized_session(loaded, kv_bits, kv_group_size)
    result = run(
        loaded,
        tokenizer,
        text,
        max_tokens=max_tokens,
        temp=temp,
        top_p=top_p,
        seed=seed,
        chat=not ignore_chat_template,
        prompt_cache=caches,
        write=(lambda piece: None) if json_ else _write,
    )
    if session is not None and save_prompt_cache is not None:
        session.save(save_prompt_cache)
    if json_:
        content = asdict(result)
        if session is not None:
            content["kv_cache"] = {
                "bytes_per_token": session.bytes_per_token,
                "tokens": session.tokens,
                "bytes": session.nbytes,
            }
        print(json.dumps(content, indent=2))
        return
    print()
    print(
        f"prompt {result.prompt_tokens} tokens, {result.prompt_tps:.1f} tokens/s; generated "
        f"{result.generation_tokens} tokens, {result.generation_tps:.1f} tokens/s; "
        f"peak memory {result.peak_memory:.3f} GB",
        file=sys.stderr,
    )
    if session is not None:
        print(
            f"cache: {session.bytes_per_token:,.0f} bytes per token; {session.nbytes:,} bytes now, "
            f"for {session.tokens} tokens",
            file=sys.stderr,
        )


def _heads(text: str) -> int | None:
    from mlx_svd.errors import MlxSvdError

    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise MlxSvdError(f"--kv-group {text}: give a number of heads, or all")
    return int(text)


def _write(piece: str) -> None:
    print(piece, end="", flush=True)
