"""Answers that a model writes, for prompts of a few words."""

from collections.abc import Sequence

from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.jobs.choice_job import Subject
from mlx_svd.evaluate.likelihood.encode import tokens_of
from mlx_svd.evaluate.likelihood.greedy import greedy_tokens
from mlx_svd.evaluate.settings import EvaluateSettings


def answers(subject: Subject, prompts: Sequence[str], settings: EvaluateSettings) -> list[str]:
    """What the model writes greedily after each prompt, up to its end token. A prompt longer than
    the context loses its beginning. Raises MlxSvdError if the context has no room for both."""
    room = _room(subject, settings)
    encoded = [tokens[-room:] for tokens in _encoded(subject, prompts)]
    stop = frozenset(subject.tokenizer.eos_token_ids or ())
    scorer = subject.scorer
    found = greedy_tokens(
        scorer.split, scorer.mask_axes, encoded, settings.tokens_generated, stop, prompts
    )
    return [subject.tokenizer.decode(tokens) for tokens in found]


def tokens_cut(subject: Subject, prompts: Sequence[str], settings: EvaluateSettings) -> list[int]:
    """How many tokens ``answers`` leaves out at the beginning of each prompt."""
    room = _room(subject, settings)
    return [max(0, len(tokens) - room) for tokens in _encoded(subject, prompts)]


def _room(subject: Subject, settings: EvaluateSettings) -> int:
    room = subject.max_length - settings.tokens_generated
    if room < 1:
        raise MlxSvdError(
            f"a context of {subject.max_length} tokens has no room for a prompt and the "
            f"{settings.tokens_generated} tokens that are generated; give a larger --max-length, "
            "or leave out facts and reasoning"
        )
    return room


def _encoded(subject: Subject, prompts: Sequence[str]) -> list[list[int]]:
    return [tokens_of(subject.tokenizer, prompt.rstrip()) for prompt in prompts]
