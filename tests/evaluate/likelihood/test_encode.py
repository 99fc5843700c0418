"""Tokens of prompts and continuations, against lm-eval's own code."""

import pytest
from lm_eval.api.model import TemplateLM

from mlx_svd.checkpoint.loader import load
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.encode import Item, context_length, encode_items, encode_pair


class Merging:
    """One token per character, but "ab" is one token: it merges across a boundary."""

    bos_token_id, eos_token_id = None, 0

    def encode(self, text, add_special_tokens=True, verbose=True):
        return [ord(c) for c in text.replace("ab", "X")]


class LmEval(TemplateLM):
    """lm-eval's tokenization of pairs; ``_loglikelihood_tokens`` is given what it made."""

    eot_token_id = 0
    loglikelihood_rolling = generate_until = tok_encode = None

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.tok_encode = lambda text, add_special_tokens=True: list(
            tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    @property
    def prefix_token_id(self):
        return self.eot_token_id

    def _loglikelihood_tokens(self, requests, **options):
        return [(before, after) for _, before, after in requests]

    def pair(self, context, continuation):
        class Request:
            args = (context, continuation)

        return self.loglikelihood([Request], disable_tqdm=True)[0]


PAIRS = [
    ("q a", "bc"),  # merges across the boundary
    ("qab", "ab"),
    ("qa ", "c"),  # spaces move to the continuation
    ("qa \n ", " c"),
    ("Question: who?\nAnswer:", " nobody"),
    ("The capital of France is", " Paris"),
    ("", "Paris is a city"),
    ("London", "ers live there"),
]


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_are_cut_as_lm_eval_cuts_them(pair):
    assert encode_pair(Merging(), *pair) == LmEval(Merging()).pair(*pair)


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_are_cut_as_lm_eval_cuts_them_with_a_real_tokenizer(pair):
    _, tokenizer = load(DEMO_MODEL, lazy=True)
    lm_eval = LmEval(tokenizer)
    lm_eval.eot_token_id = tokenizer.eos_token_id
    assert encode_pair(tokenizer, *pair) == lm_eval.pair(*pair)


def test_a_merge_across_the_boundary_keeps_the_tokens_of_the_context_alone():
    before, after = encode_pair(Merging(), "q a", "bc")
    assert before == [ord(c) for c in "q a"]
    assert after == [ord("c")]


def test_a_continuation_without_tokens_of_its_own_is_refused_with_the_name_of_its_item():
    with pytest.raises(MlxSvdError, match=r"row 7: 'qa'.*no tokens of its own"):
        encode_items(Merging(), [Item("row 7", (("qa", "b"),))], 100)


def test_a_long_prompt_loses_its_beginning_as_in_lm_eval_and_the_cut_is_counted():
    context, continuation = "abcdefghij", "klm"
    (item,) = encode_items(Merging(), [Item("x", ((context, continuation), (context, "k")))], 8)
    whole = Merging().encode(context + continuation)
    # lm-eval: (context + continuation)[-(max_length + 1):], whose last token is only predicted.
    assert [t for part in item.pairs[0] for t in part] == whole[-9:]
    assert item.pairs[0][1] == tuple(whole[-3:])
    assert len(item.pairs[1][0]) == 8
    assert item.truncated == 3


def test_a_prompt_that_fits_exactly_is_not_cut():
    (item,) = encode_items(Merging(), [Item("x", (("cdefgh", "klm"),))], 8)
    assert (len(item.pairs[0][0]), item.truncated) == (6, 0)


def test_a_continuation_longer_than_the_context_is_refused():
    with pytest.raises(MlxSvdError, match=r"x: a continuation of 9 tokens.*context of 8"):
        encode_items(Merging(), [Item("x", (("q", "c" * 9),))], 8)


def test_the_context_length_is_that_of_the_config_then_of_the_tokenizer():
    class Tokenizer:
        model_max_length = 512

    assert context_length({"n_positions": 1024}, Tokenizer()) == 1024
    assert context_length({"max_position_embeddings": 64}, Tokenizer()) == 64
    assert context_length({}, Tokenizer()) == 512
    Tokenizer.model_max_length = 10**30
    assert context_length({}, Tokenizer()) == 2048
