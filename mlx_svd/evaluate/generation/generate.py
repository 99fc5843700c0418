"""Generate text with mlx-lm and report its speed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_svd.errors import MlxSvdError


@dataclass(frozen=True)
class Generation:
    """text; tokens generated; speeds in tokens per second; peak_memory in GB (MLX's count)."""

    text: str
    prompt_tokens: int
    generation_tokens: int
    prompt_tps: float
    generation_tps: float
    peak_memory: float
    finish_reason: str | None


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = True,
    prompt_cache: list[Any] | None = None,
    write: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Continue ``prompt`` (greedily at temp 0); ``write`` gets each piece of text as it comes.

    chat: put the prompt into the tokenizer's chat template, if it has one; prompt_cache: caches to
    use, empty or with the text before the prompt, which grow in place. Raises MlxSvdError for
    a prompt without tokens.
    """
    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(seed)
    if chat and tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    else:
        tokens = tokenizer.encode(prompt)
    if not len(tokens):
        raise MlxSvdError(f"the prompt {prompt!r} has no tokens; give a text to continue")
    text, last = "", None
    options = {"max_tokens": max_tokens, "sampler": make_sampler(temp, top_p)}
    if prompt_cache is not None:
        options["prompt_cache"] = prompt_cache
    for last in stream_generate(model, tokenizer, tokens, **options):
        text += last.text
        write(last.text)
    return Generation(
        text,
        last.prompt_tokens,
        last.generation_tokens,
        last.prompt_tps,
        last.generation_tps,
        last.peak_memory,
        last.finish_reason,
    )
