"""Continue many prompts at once with mlx-lm's batch generator, greedily or with real seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.errors import MlxSvdError

# Where a model's arguments say how many positions it has. Beyond them a learned position embedding
# is read past its end.
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")


@dataclass(frozen=True)
class Sampling:
    """temp: divides the log-probabilities; top_p: samples only from the smallest set of tokens that
    has this probability (nucleus sampling); seed: of the random numbers."""

    temp: float = 1.0
    top_p: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Continuation:
    """tokens: generated ids, without the end token; ended: the model ended the text itself."""

    tokens: list[int]
    ended: bool


def continuations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    numbers: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    batch_size: int = 32,
) -> list[Continuation]:
    """Continue prompts (token ids) up to ``max_tokens`` tokens or the end token.

    sampling None: greedy. numbers: of the prompts, by default 0, 1, ...; a prompt's random
    numbers come from the seed and its number alone, so a text depends neither on the batch it was
    in nor on the prompts beside it. Batching changes no number except by rounding: greedy texts
    are those of one prompt at a time. names: of the prompts in errors. Raises MlxSvdError for a
    prompt without tokens, one that leaves no room in the model's context, a cache that cannot be
    batched and for NaN.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    names = [f"prompt {number}" for number in numbers] if names is None else names
    _check(model, prompts, names, max_tokens, batch_size)
    if sampling is not None:
        _check_sampling(sampling)
    found: list[Continuation] = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        samplers = None
        if sampling is not None:
            samplers = [_sampler(sampling, number, max_tokens) for number in numbers[rows]]
        found += _batch(model, tokenizer, prompts[rows], names[rows], max_tokens, samplers)
    return found


def _batch(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    names: Sequence[str],
    max_tokens: int,
    samplers: list[Callable[[mx.array], mx.array]] | None,
) -> list[Continuation]:
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=len(prompts),
        prefill_batch_size=len(prompts),
    )
    try:
        uids = generator.insert(
            [list(p) for p in prompts], [max_tokens] * len(prompts), samplers=samplers
        )
        place = {uid: i for i, uid in enumerate(uids)}
        tokens: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        try:
            responses = generator.next_generated()
        except ValueError as error:
            if "batching" not in str(error):
                raise
            raise MlxSvdError(
                f"generation: {error}; mlx-lm cannot batch this model, which generation quality "
                "needs: leave this task out"
            ) from error
        while responses:
            for response in responses:
                row = place[response.uid]
                ended[row] = response.finish_reason == "stop"
                if not ended[row]:
                    tokens[row].append(response.token)
                # NaN stays in the keys and values, so the last token shows it.
                if response.finish_reason and mx.isnan(response.logprobs[response.token]).item():
                    raise MlxSvdError(
                        f"{names[row]}: a log-probability is NaN; the model overflows or "
                        "holds NaN, load it in float32 or make the checkpoint again"
                    )
            responses = generator.next_generated()
    finally:
        generator.close()
    return [Continuation(t, e) for t, e in zip(tokens, ended, strict=True)]


def _check_sampling(sampling: Sampling) -> None:
    if not (sampling.temp > 0 and 0 < sampling.top_p <= 1 and sampling.seed >= 0):
        raise MlxSvdError(
            f"sampling: temperature {sampling.temp}, top-p {sampling.top_p}, seed {sampling.seed}; "
            "give a temperature above 0, top-p above 0 up to 1 and a seed of 0 or more"
        )


def _sampler(sampling: Sampling, number: int, max_tokens: int) -> Callable[[mx.array], mx.array]:
    """log-probabilities (1, V) -> token (1,); every call uses the next random key."""
    from mlx_lm.sample_utils import apply_top_p

    seed = np.random.SeedSequence([sampling.seed, number]).generate_state(1, np.uint64)[0]
    # One more than are kept: mlx-lm computes the next token while it hands out the last one.
    keys = iter(mx.random.split(mx.random.key(int(seed)), max_tokens + 1))

    def sample(log_probs: mx.array) -> mx.array:
        if sampling.top_p < 1:
            log_probs = apply_top_p(log_probs, sampling.top_p)
        return mx.random.categorical(log_probs / sampling.temp, key=next(keys))

    return sample


def _check(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    names: Sequence[str],
    max_tokens: int,
    batch_size: int,
) -> None:
    if max_tokens < 1 or batch_size < 1:
        raise MlxSvdError(
            f"generation: {max_tokens} tokens in batches of {batch_size}; give at least 1 of both"
        )
    arguments = getattr(model, "args", None)
    context = next((v for k in _POSITIONS if (v := getattr(arguments, k, None))), None)
    for name, prompt in zip(names, prompts, strict=True):
        if not len(prompt):
            raise MlxSvdError(f"{name}: has no tokens; give a text to continue")
        if context is not None and len(prompt) + max_tokens > context:
            raise MlxSvdError(
                f"{name}: {len(prompt)} tokens and {max_tokens} to generate do not fit "
                f"into the model's context of {context}; shorten the prompt or generate fewer "
                "tokens"
            )
