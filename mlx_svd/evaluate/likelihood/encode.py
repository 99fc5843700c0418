"""Prompts and their continuations -> tokens, as lm-eval cuts, joins and truncates them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_svd.errors import MlxSvdError

# lm-eval's length where neither config nor tokenizer says one.
_DEFAULT_LENGTH = 2048
# Tokenizers without a length say 10^30.
_NO_LENGTH = 10**9
_LENGTH_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")


@dataclass(frozen=True)
class Item:
    """name: for messages; pairs: (context, continuation), one for each choice."""

    name: str
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class EncodedItem:
    """pairs: (context, continuation) as token ids, neither empty; truncated: tokens that were cut
    off the left of its longest context."""

    name: str
    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    truncated: int


def encode_pair(
    tokenizer: Any,
    context: str,
    continuation: str,
    known: dict[str, list[int]] | None = None,
) -> tuple[list[int], list[int]]:
    """(tokens of the context, tokens of the continuation), as lm-eval's ``_encode_pair``.

    Trailing spaces of the context move to the continuation. Both are encoded as one text; the
    context's tokens are those it has alone and the continuation's are what follows as many tokens
    of the whole, even where a merge across the boundary made the last of these another token. An
    empty context becomes the tokenizer's first token (or its end token). known: tokens of contexts,
    used and added to. Raises MlxSvdError if the continuation has no tokens of its own.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        return _without_context(tokenizer, continuation)
    known = {} if known is None else known
    alone = known.get(stripped) or known.setdefault(stripped, tokens_of(tokenizer, stripped))
    following = tokens_of(tokenizer, stripped + continuation)[len(alone) :]
    if not alone or not following:
        raise MlxSvdError(
            f"{_end(stripped)!r} + {continuation!r}: the continuation has no tokens of its own; "
            "change the prompt"
        )
    return alone, following


def tokens_of(tokenizer: Any, text: str, **options: bool) -> list[int]:
    """Token ids, without transformers' warning that a text is longer than the model's context."""
    return list(tokenizer.encode(text, verbose=False, **options))


def _without_context(tokenizer: Any, continuation: str) -> tuple[list[int], list[int]]:
    following = tokens_of(tokenizer, continuation, add_special_tokens=False)
    first = prefix_token(tokenizer)
    if following and following[0] == first:
        following = following[1:]
    if not following:
        raise MlxSvdError(f"{continuation!r}: has no tokens; give a text to score")
    return [first], following


def prefix_token(tokenizer: Any) -> int:
    """The token before a text without context: the tokenizer's first one, or its end token."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise MlxSvdError("the tokenizer has neither a first nor an end token to begin a text with")


def context_length(config: dict, tokenizer: Any) -> int:
    """Tokens that a model takes, from its config, its tokenizer, or 2048 as in lm-eval."""
    for key in _LENGTH_KEYS:
        if isinstance(config.get(key), int):
            return config[key]
    length = getattr(tokenizer, "model_max_length", None)
    return length if isinstance(length, int) and length < _NO_LENGTH else _DEFAULT_LENGTH


def encode_items(tokenizer: Any, items: Sequence[Item], max_length: int) -> list[EncodedItem]:
    """Items as tokens that fit into ``max_length``.

    The last token is only predicted, so a pair may have one more. Longer ones lose tokens on the
    left, as in lm-eval. Raises MlxSvdError that names the item, also for a continuation that is
    longer than the model's context.
    """
    return [_encoded(tokenizer, item, max_length) for item in items]


def _encoded(tokenizer: Any, item: Item, max_length: int) -> EncodedItem:
    known: dict[str, list[int]] = {}
    alone: dict[str, tuple[int, ...]] = {}
    pairs, truncated = [], 0
    for context, continuation in item.pairs:
        try:
            before, after = encode_pair(tokenizer, context, continuation, known)
        except MlxSvdError as error:
            raise MlxSvdError(f"{item.name}: {error}") from error
        if len(after) > max_length:
            raise MlxSvdError(
                f"{item.name}: a continuation of {len(after)} tokens is longer than the context of "
                f"{max_length} (the model's, or --max-length); shorten it"
            )
        cut = max(0, len(before) + len(after) - max_length - 1)
        truncated = max(truncated, cut)
        # One tuple for all choices, so that a shared context is recognized by identity of value.
        before = alone.setdefault(f"{cut} {context}", tuple(before[cut:]))
        pairs.append((before, tuple(after)))
    return EncodedItem(item.name, tuple(pairs), truncated)


def _end(text: str) -> str:
    return text if len(text) < 60 else "..." + text[-60:]


def tokens_hash(tokens: Sequence[int]) -> str:
    """Names a window of token ids, so that two models' windows of a text are told apart."""
    return hashlib.sha256(",".join(str(int(t)) for t in tokens).encode()).hexdigest()[:16]
