"""Generation quality: what a model writes after many prompts, and how much of it repeats itself.

Perplexity sees one token at a time after a true text; a model can score well there and still get
stuck in a loop as soon as it reads its own words.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.generation.continuations import Continuation, Sampling, continuations
from mlx_svd.evaluate.generation.prompts import Prompt
from mlx_svd.evaluate.generation.repetition import loops, repetition
from mlx_svd.evaluate.generation.summary import QUALITY_METRICS, generation_summary
from mlx_svd.evaluate.likelihood.encode import tokens_of
from mlx_svd.evaluate.statistics.intervals import Estimate

TASK = "generation"
GREEDY, SAMPLED = "greedy", "sampled"

Record = dict[str, Any]


@dataclass(frozen=True)
class GenerationSettings:
    """modes: greedy, sampled or both; max_tokens: of a text; temp, top_p: of sampling; seeds: one
    sampled text a prompt for each; batch_size: texts at once; chat: put prompts into the
    tokenizer's chat template, if it has one; max_length: tokens of prompt and text together, longer
    prompts lose their beginning (None: none does, ``continuations`` refuses them). Raises
    MlxSvdError for other modes, for seeds given twice and for a length without room for a prompt.
    """

    modes: Sequence[str] = (GREEDY, SAMPLED)
    max_tokens: int = 128
    temp: float = 1.0
    top_p: float = 0.95
    seeds: Sequence[int] = (0,)
    batch_size: int = 32
    chat: bool = True
    max_length: int | None = None

    def __post_init__(self):
        if not self.modes or not set(self.modes) <= {GREEDY, SAMPLED}:
            raise MlxSvdError(
                f"generation: modes {list(self.modes)}; give {GREEDY}, {SAMPLED} or both"
            )
        if SAMPLED in self.modes and (not self.seeds or len(set(self.seeds)) < len(self.seeds)):
            raise MlxSvdError(
                f"generation: seeds {list(self.seeds)}; give at least one, none twice: the same "
                "seed gives the same text"
            )
        if self.max_length is not None and self.max_length <= self.max_tokens:
            raise MlxSvdError(
                f"generation: a context of {self.max_length} tokens has no room for a prompt and "
                f"{self.max_tokens} generated tokens; give a larger --max-length, or leave out "
                "this task"
            )


@dataclass(frozen=True)
class Text:
    """One text to generate. doc_id: its number among all texts; number: that of its prompt, which
    with the seed (None: greedy) decides the random numbers."""

    doc_id: int
    number: int
    prompt: Prompt
    mode: str
    seed: int | None


@dataclass(frozen=True)
class GenerationQuality:
    """records: one for each text, as written to JSONL; summary: "metric,filter" -> value with
    standard error and 95 % interval (see ``generation_summary``)."""

    records: list[Record]
    summary: dict[str, Estimate] = field(repr=False)


def generation_texts(prompts: Sequence[Prompt], settings: GenerationSettings) -> list[list[Text]]:
    """All texts of a run in batches: every prompt greedily, then with each seed. Raises
    MlxSvdError for no prompts."""
    if not prompts:
        raise MlxSvdError("generation: no prompts were given to continue")
    runs = [
        (mode, seed)
        for mode in settings.modes
        for seed in (settings.seeds if mode == SAMPLED else (None,))
    ]
    batches = []
    for place, (mode, seed) in enumerate(runs):
        texts = [
            Text(place * len(prompts) + i, i, prompt, mode, seed)
            for i, prompt in enumerate(prompts)
        ]
        step = max(1, settings.batch_size)
        batches += [texts[i : i + step] for i in range(0, len(texts), step)]
    return batches


def generation_records(
    model: nn.Module, tokenizer: Any, texts: Sequence[Text], settings: GenerationSettings
) -> list[Record]:
    """Generate texts of one mode and seed, and count what repeats. Raises MlxSvdError for what
    ``continuations`` refuses, naming the prompt by its id."""
    if not texts:
        return []
    seed = texts[0].seed
    found = continuations(
        model,
        tokenizer,
        [_fitted(_encode(tokenizer, text.prompt, settings), settings) for text in texts],
        max_tokens=settings.max_tokens,
        sampling=None if seed is None else Sampling(settings.temp, settings.top_p, seed),
        numbers=[text.number for text in texts],
        names=[f"prompt {text.prompt.id!r}" for text in texts],
        batch_size=settings.batch_size,
    )
    return [
        _record(text, settings, continuation, tokenizer.decode(continuation.tokens))
        for text, continuation in zip(texts, found, strict=True)
    ]


def generation_quality(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: GenerationSettings | None = None,
    *,
    known: Sequence[Record] = (),
    write: Callable[[Record], None] = lambda record: None,
) -> GenerationQuality:
    """Continue every prompt greedily and, with each seed, sampled; measure the texts.

    known: records of an interrupted run with the same settings, not generated again. write: gets
    each new record as its batch is done. A text depends neither on its batch nor on what was known.
    Raises MlxSvdError for no prompts, for known records of other prompts, and for what
    ``continuations`` refuses.
    """
    settings = settings or GenerationSettings()
    batches = generation_texts(prompts, settings)
    done = {record["doc_id"]: record for record in known}
    for text in (text for batch in batches for text in batch):
        _check_known(done.get(text.doc_id), text, settings)
    records = []
    for batch in batches:
        left = [text for text in batch if text.doc_id not in done]
        for record in generation_records(model, tokenizer, left, settings):
            done[record["doc_id"]] = record
            write(record)
        records += [done[text.doc_id] for text in batch]
    return GenerationQuality(records, generation_summary(records))


def prompt_cuts(
    tokenizer: Any, prompts: Sequence[Prompt], settings: GenerationSettings
) -> list[int]:
    """How many tokens each prompt loses at its beginning."""
    encoded = [_encode(tokenizer, prompt, settings) for prompt in prompts]
    return [len(tokens) - len(_fitted(tokens, settings)) for tokens in encoded]


def _fitted(tokens: list[int], settings: GenerationSettings) -> list[int]:
    if settings.max_length is None:
        return tokens
    return tokens[-(settings.max_length - settings.max_tokens) :]


def _encode(tokenizer: Any, prompt: Prompt, settings: GenerationSettings) -> list[int]:
    if settings.chat and tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt.text}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    return tokens_of(tokenizer, prompt.text)


def _conditions(text: Text, settings: GenerationSettings) -> Record:
    """What the numbers of a text depend on, beside model and prompt."""
    sampled = {} if text.seed is None else {"temp": settings.temp, "top_p": settings.top_p}
    return {"max_tokens": settings.max_tokens, "chat": settings.chat, **sampled}


def _record(
    text: Text, settings: GenerationSettings, continuation: Continuation, written: str
) -> Record:
    tokens = continuation.tokens
    return {
        "doc_id": text.doc_id,
        "id": text.prompt.id,
        "task": TASK,
        "filter": text.mode,
        "seed": text.seed,
        "settings": _conditions(text, settings),
        "prompt": text.prompt.text,
        "text": written,
        "tokens": tokens,
        "metrics": list(QUALITY_METRICS),
        **{f"rep_{n}": repetition(tokens, n) for n in (2, 3, 4)},
        "loop": int(loops(tokens)),
        "length": len(tokens),
        "ended": int(continuation.ended),
    }


def _check_known(record: Record | None, text: Text, settings: GenerationSettings) -> None:
    if record is None:
        return
    wanted = {
        "prompt": text.prompt.text,
        "filter": text.mode,
        "seed": text.seed,
        "settings": _conditions(text, settings),
    }
    for key, value in wanted.items():
        if record[key] != value:
            raise MlxSvdError(
                f"generation: the known record {record['id']!r} has another {key} "
                f"({record[key]!r}, wanted {value!r}); give the prompts and settings of that run, "
                "or start a new one"
            )
