"""Tokens per second of reading a prompt and of greedy generation, as mlx-lm counts them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import mlx.nn as nn

from mlx_svd.errors import MlxSvdError


@dataclass(frozen=True)
class Speed:
    """Medians over ``runs`` measured runs, in tokens per second: prefill_tps of reading the
    prompt, decode_tps of generation; prompt_tokens, generated_tokens: of one run."""

    prefill_tps: float
    decode_tps: float
    prompt_tokens: int
    generated_tokens: int
    runs: int


def measure_speed(
    model: nn.Module,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_tokens: int = 64,
    runs: int = 3,
) -> Speed:
    """Speed of one model; see :func:`measure_speeds`."""
    return measure_speeds([model], tokenizer, prompt, max_tokens=max_tokens, runs=runs)[0]


def measure_speeds(
    models: Sequence[nn.Module],
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_tokens: int = 64,
    runs: int = 3,
) -> list[Speed]:
    """Speed of ``mlx_lm.stream_generate`` after a prompt of token ids, greedily, for each model.

    The models take turns, so that whatever else the machine does meets all of them. One more run
    goes before the measured ones and is discarded: it compiles kernels and reads weights. End
    tokens do not end a run, so all models generate equally many tokens. Raises MlxSvdError for an
    empty prompt or no runs.
    """
    from mlx_lm.generate import stream_generate

    if not len(prompt) or max_tokens < 2 or runs < 1:
        raise MlxSvdError(
            f"speed: a prompt of {len(prompt)} tokens, {max_tokens} tokens to generate and {runs} "
            "runs; need at least 1, 2 and 1"
        )
    end_tokens = tokenizer.eos_token_ids
    # An empty set, as in `mlx_lm benchmark`: generation goes on to max_tokens.
    tokenizer.eos_token_ids = set()
    try:
        rounds = [
            [
                _last(stream_generate(m, tokenizer, list(prompt), max_tokens=max_tokens))
                for m in models
            ]
            for _ in range(runs + 1)
        ][1:]
    finally:
        tokenizer.eos_token_ids = end_tokens
    return [
        Speed(
            median(step.prompt_tps for step in steps),
            median(step.generation_tps for step in steps),
            steps[0].prompt_tokens,
            steps[0].generation_tokens,
            runs,
        )
        for steps in zip(*rounds, strict=True)
    ]


def _last(responses: Any) -> Any:
    """The last response of a run; its counts and speeds cover the whole run."""
    last = None
    for response in responses:
        last = response
    return last
