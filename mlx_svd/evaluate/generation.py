"""Generation quality: what a model writes after many prompts, and how much of it repeats itself.

Perplexity sees one token at a time after a true text; a model can score well there and still get
stuck in a loop as soon as it reads its own words.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.continuations import Continuation, Sampling, continuations
from mlx_svd.evaluate.generation_summary import QUALITY_METRICS, generation_summary
from mlx_svd.evaluate.prompts import Prompt
from mlx_svd.evaluate.repetition import loops, repetition
from mlx_svd.evaluate.statistics import Estimate

TASK = "generation"
GREEDY, SAMPLED = "greedy", "sampled"

Record = dict[str, Any]


@dataclass(frozen=True)
class GenerationQuality:
    """records: one for each prompt and way to generate, as written to JSONL; summary:
    "metric,filter" -> value with standard error and 95 % interval (see ``generation_summary``)."""

    records: list[Record]
    summary: dict[str, Estimate]


def generation_quality(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    modes: Sequence[str] = (GREEDY, SAMPLED),
    max_tokens: int = 128,
    temp: float = 1.0,
    top_p: float = 0.95,
    seeds: Sequence[int] = (0,),
    batch_size: int = 32,
    chat: bool = True,
    known: Sequence[Record] = (),
    write: Callable[[Record], None] = lambda record: None,
) -> GenerationQuality:
    """Continue every prompt greedily and, with each seed, sampled; measure the texts.

    chat: put prompts into the tokenizer's chat template, if it has one. known: records of an
    interrupted run with the same settings, not generated again. write: gets each new record as
    its batch is done. Of one prompt the sampled text depends on seed and number of the prompt, not
    on batches or on what was known. Raises MlxSvdError for no prompts, unknown modes, no seeds,
    known records of other prompts, and what ``continuations`` refuses.
    """
    _check(prompts, modes, seeds, known)
    tokens = [_encode(tokenizer, prompt, chat) for prompt in prompts]
    done = {_key(record): record for record in known}
    records: list[Record] = []
    for mode, seed in _runs(modes, seeds):
        wanted = [i for i, prompt in enumerate(prompts) if (mode, seed, prompt.id) not in done]
        sampling = None if seed is None else Sampling(temp, top_p, seed)
        for start in range(0, len(wanted), batch_size):
            rows = wanted[start : start + batch_size]
            found = continuations(
                model,
                tokenizer,
                [tokens[i] for i in rows],
                max_tokens=max_tokens,
                sampling=sampling,
                numbers=rows,
                names=[repr(prompts[i].id) for i in rows],
                batch_size=batch_size,
            )
            for i, continuation in zip(rows, found, strict=True):
                text = tokenizer.decode(continuation.tokens)
                record = _record(i, prompts[i], mode, seed, continuation, text)
                done[_key(record)] = record
                write(record)
        records += [done[mode, seed, prompt.id] for prompt in prompts]
    return GenerationQuality(records, generation_summary(records))


def _runs(modes: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, int | None]]:
    for mode in modes:
        for seed in seeds if mode == SAMPLED else (None,):
            yield mode, seed


def _encode(tokenizer: Any, prompt: Prompt, chat: bool) -> list[int]:
    if chat and tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt.text}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    return list(tokenizer.encode(prompt.text))


def _record(
    number: int,
    prompt: Prompt,
    mode: str,
    seed: int | None,
    continuation: Continuation,
    text: str,
) -> Record:
    tokens = continuation.tokens
    return {
        "doc_id": number,
        "id": prompt.id,
        "task": TASK,
        "filter": mode,
        "seed": seed,
        "prompt": prompt.text,
        "text": text,
        "tokens": tokens,
        "metrics": list(QUALITY_METRICS),
        **{f"rep_{n}": repetition(tokens, n) for n in (2, 3, 4)},
        "loop": int(loops(tokens)),
        "length": len(tokens),
        "ended": int(continuation.ended),
    }


def _key(record: Record) -> tuple[str, int | None, str]:
    return record["filter"], record["seed"], record["id"]


def _check(
    prompts: Sequence[Prompt], modes: Sequence[str], seeds: Sequence[int], known: Sequence[Record]
) -> None:
    if not prompts:
        raise MlxSvdError("generation: no prompts were given to continue")
    if not modes or not set(modes) <= {GREEDY, SAMPLED}:
        raise MlxSvdError(f"generation: modes {list(modes)}; give {GREEDY}, {SAMPLED} or both")
    if SAMPLED in modes and (not seeds or len(set(seeds)) < len(seeds)):
        raise MlxSvdError(
            f"generation: seeds {list(seeds)}; give at least one, none twice: the same seed gives "
            "the same text"
        )
    texts = {prompt.id: prompt.text for prompt in prompts}
    for record in known:
        if texts.get(record["id"]) != record["prompt"]:
            raise MlxSvdError(
                f"generation: the known record {record['id']!r} belongs to another prompt; give "
                "the prompts of that run, or start a new one"
            )
