"""Answers that a model writes, for prompts of a few words."""

from collections.abc import Sequence

from mlx_svd.evaluate.jobs.choice_job import Subject
from mlx_svd.evaluate.likelihood.encode import tokens_of
from mlx_svd.evaluate.likelihood.greedy import greedy_tokens
from mlx_svd.evaluate.settings import EvaluateSettings


def answers(subject: Subject, prompts: Sequence[str], settings: EvaluateSettings) -> list[str]:
    """What the model writes greedily after each prompt, up to its end token. A prompt longer than
    the context loses its beginning."""
    room = subject.max_length - settings.tokens_generated
    encoded = [tokens_of(subject.tokenizer, prompt.rstrip())[-room:] for prompt in prompts]
    stop = frozenset(subject.tokenizer.eos_token_ids or ())
    scorer = subject.scorer
    found = greedy_tokens(
        scorer.split, scorer.mask_axes, encoded, settings.tokens_generated, stop, prompts
    )
    return [subject.tokenizer.decode(tokens) for tokens in found]
