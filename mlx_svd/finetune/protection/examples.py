"""What is trained on: facts and rows in mlx-lm's formats -> batches of tokens with a mask."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.facts import Fact
from mlx_svd.evaluate.likelihood.encode import encode_pair
from mlx_svd.evaluate.rows.read import read_jsonl
from mlx_svd.source.source import brief


@dataclass(frozen=True)
class Example:
    """tokens: of the whole text; offset: how many of them are the prompt (0: none is)."""

    tokens: tuple[int, ...]
    offset: int


def fact_examples(tokenizer: Any, facts: Sequence[Fact], trained: str) -> list[Example]:
    """prompt + " " + object, without an end token, in the tokens in which facts are asked; trained:
    "conflict" or "object"."""
    found = []
    for fact in facts:
        prompt, answer = encode_pair(tokenizer, fact.prompt, " " + getattr(fact, trained))
        found.append(Example((*prompt, *answer), len(prompt)))
    return found


def data_examples(tokenizer: Any, path: str | Path, answers_only: bool) -> list[Example]:
    """Rows of a .jsonl file in mlx-lm's training formats: {text}, {prompt, completion} or
    {messages}, read by mlx-lm itself. answers_only: the loss will be on completions or the last
    reply. Raises MlxSvdError naming the file for rows of another format."""
    from mlx_lm.tuner.datasets import create_dataset

    path = Path(path)
    rows = [row for _, row in read_jsonl(path)]
    if not rows:
        raise MlxSvdError(f"{path}: holds no rows; give at least one")
    try:
        dataset = create_dataset(rows, tokenizer, SimpleNamespace(mask_prompt=answers_only))
        processed = [dataset.process(row) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MlxSvdError(
            f"{path}: mlx-lm cannot read it as training rows ({brief(error)}); give one format in "
            "all rows: text, prompt and completion, or messages (the latter two need a tokenizer "
            "with a chat template)"
        ) from error
    return [Example(tuple(tokens), offset) for tokens, offset in processed]


class Batches:
    """Batches of examples: functions of seed, stream and step only.

    stream: tells several sets of one run apart; answers_only: mask the prompt; mask_padding: False
    trains padding as well; pad_to: tokens that every row is padded or cut to (None: the longest of
    the batch); longest: tokens at most (longer ones are cut at the end). Raises MlxSvdError for no
    examples and for one of which no token is trained.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        size: int,
        seed: int,
        *,
        stream: int,
        pad_token: int,
        longest: int,
        answers_only: bool = False,
        mask_padding: bool = True,
        pad_to: int | None = None,
    ):
        if not examples:
            raise MlxSvdError("there is nothing to train on; give --conflict or --data")
        limit = min(longest, pad_to or longest)
        self.examples = [Example(e.tokens[:limit], e.offset) for e in examples]
        self.cut = sum(len(e.tokens) > limit for e in examples)
        self._size, self._seed, self._stream = size, seed, stream
        self._pad_token, self._pad_to = pad_token, min(pad_to, longest) if pad_to else None
        self._answers_only, self._mask_padding = answers_only, mask_padding
        for number, example in enumerate(self.examples):
            if len(example.tokens) < 2 or (answers_only and example.offset >= len(example.tokens)):
                raise MlxSvdError(
                    f"training example {number} has no token to predict within {limit} tokens; "
                    "lengthen it, or give a larger --pad-to"
                )

    @property
    def digest(self) -> str:
        """SHA-256 of the examples."""
        rows = [[*e.tokens, e.offset] for e in self.examples]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens (size, L) int32, mask (size, L - 1) float32: 1 where the next token is trained)
        of one step, from 0. Epochs are permutations, one after the other, cut into batches."""
        count, rows = len(self.examples), []
        for position in range(step * self._size, (step + 1) * self._size):
            key = [self._seed, self._stream, position // count]
            rows.append(
                self.examples[np.random.default_rng(key).permutation(count)[position % count]]
            )
        length = self._pad_to or max(len(row.tokens) for row in rows)
        tokens = np.full((len(rows), length), self._pad_token, dtype=np.int32)
        mask = np.zeros((len(rows), length - 1), dtype=np.float32)
        for i, row in enumerate(rows):
            tokens[i, : len(row.tokens)] = row.tokens
            # Position t of the mask belongs to token t + 1.
            first = max(0, row.offset - 1) if self._answers_only else 0
            last = len(row.tokens) - 1 if self._mask_padding else length - 1
            mask[i, first:last] = 1
        return tokens, mask
