"""Batches of generated texts against one prompt at a time."""

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache

from mlx_svd.checkpoint.loader import load, load_model
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.generation.continuations import Sampling, continuations
from mlx_svd.evaluate.generation.prompts import read_prompts
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def demo():
    return load(DEMO_MODEL, dtype="float32")


@pytest.fixture(scope="module")
def prompts(demo):
    return [demo[1].encode(p.text) for p in read_prompts()[::16]]


def alone(model, tokenizer, prompt, max_tokens):
    """Greedily with mlx-lm's loop for a single prompt: (tokens, ended)."""
    tokens = []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=max_tokens):
        if token in tokenizer.eos_token_ids:
            return tokens, True
        tokens.append(token)
    return tokens, False


def test_greedy_texts_of_a_batch_are_those_of_one_prompt_at_a_time(demo, prompts):
    found = continuations(*demo, prompts, max_tokens=40, batch_size=8)
    assert len({len(p) for p in prompts}) > 3
    for prompt, text in zip(prompts, found, strict=True):
        assert (text.tokens, text.ended) == alone(*demo, prompt, 40)


@pytest.mark.parametrize("name", ["gpt2-14m", "gpt-neo-8m", "qwen2-16m"])
def test_batches_are_right_in_other_architectures(shared, name):
    model, tokenizer = load(shared / "models" / name, dtype="float32")
    prompts = [tokenizer.encode(p.text) for p in read_prompts(limit=6)]
    found = continuations(model, tokenizer, prompts, max_tokens=16)
    for prompt, text in zip(prompts, found, strict=True):
        assert (text.tokens, text.ended) == alone(model, tokenizer, prompt, 16)


def test_a_text_ends_at_the_end_token_and_does_not_hold_it(demo, prompts):
    model, tokenizer = demo
    plain = continuations(model, tokenizer, prompts[:4], max_tokens=20)
    end = plain[0].tokens[9]
    ends = {end} | set(tokenizer.eos_token_ids)

    class Ending:
        eos_token_ids = ends

    stopped = continuations(model, Ending(), prompts[:4], max_tokens=20)
    first = plain[0].tokens.index(end)
    assert (stopped[0].tokens, stopped[0].ended) == (plain[0].tokens[:first], True)
    for before, after in zip(plain, stopped, strict=True):
        assert after.ended == (end in before.tokens)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_sampled_text_depends_on_seed_and_number_and_on_no_neighbour(demo, prompts, batch_size):
    sampling = Sampling(seed=5)
    together = continuations(*demo, prompts[:6], max_tokens=12, sampling=sampling)
    again = continuations(
        *demo, prompts[:6], max_tokens=12, sampling=sampling, batch_size=batch_size
    )
    assert [c.tokens for c in again] == [c.tokens for c in together]
    last = continuations(*demo, prompts[5:6], max_tokens=12, sampling=sampling, numbers=[5])
    assert last[0].tokens == together[5].tokens


def test_other_seeds_and_other_numbers_give_other_texts(demo, prompts):
    prompt = prompts[0]
    same = continuations(*demo, [prompt] * 3, max_tokens=12, sampling=Sampling(seed=1))
    other = continuations(*demo, [prompt], max_tokens=12, sampling=Sampling(seed=2))
    texts = {tuple(c.tokens) for c in (*same, *other)}
    assert len(texts) == 4


def test_sampling_follows_the_probabilities(demo, prompts):
    model, tokenizer = demo
    prompt = prompts[1]
    logits = model(mx.array(prompt)[None])[0, -1]
    best = int(mx.argmax(logits).item())
    p = mx.softmax(logits)[best].item()
    n = 400
    drawn = continuations(
        model, tokenizer, [prompt] * n, max_tokens=1, sampling=Sampling(top_p=1.0), batch_size=n
    )
    share = sum(c.tokens[:1] == [best] for c in drawn) / n
    assert abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_cold_or_narrow_sampling_is_greedy(demo, prompts):
    greedy = continuations(*demo, prompts[:3], max_tokens=8)
    for sampling in (Sampling(temp=1e-4), Sampling(top_p=1e-6)):
        assert continuations(*demo, prompts[:3], max_tokens=8, sampling=sampling) == greedy


class NoEnd:
    eos_token_ids = frozenset()


def test_nan_names_the_prompt(tmp_path):
    model, _ = load_model(write_tiny("llama", tmp_path / "m"))
    model.update({"lm_head": {"weight": mx.full(model.lm_head.weight.shape, mx.nan)}})
    with pytest.raises(MlxSvdError, match="prompt 3: a log-probability is NaN"):
        continuations(model, NoEnd(), [[1, 2]], max_tokens=3, numbers=[3])


def test_a_cache_that_cannot_be_batched_is_refused(tmp_path, monkeypatch):
    model, _ = load_model(write_tiny("llama", tmp_path / "m"))
    monkeypatch.delattr(KVCache, "merge")
    with pytest.raises(MlxSvdError, match="cannot batch this model"):
        continuations(model, NoEnd(), [[1, 2]], max_tokens=3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": [[1], []]}, "prompt 1: has no tokens"),
        ({"prompts": [[1] * 120]}, "prompt 0: 120 tokens and 9 to generate do not fit.* 128"),
        ({"max_tokens": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"sampling": Sampling(temp=0.0)}, "temperature"),
        ({"sampling": Sampling(top_p=0.0)}, "top-p"),
        ({"sampling": Sampling(seed=-1)}, "seed"),
    ],
)
def test_what_cannot_be_generated_is_refused(tmp_path, change, words):
    model, _ = load_model(write_tiny("llama", tmp_path / "m"))
    call = {"prompts": [[1, 2]], "max_tokens": 9, **change}
    with pytest.raises(MlxSvdError, match=words):
        continuations(model, NoEnd(), call.pop("prompts"), **call)
