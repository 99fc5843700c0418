"""What measure_speed runs and which numbers it takes; no test measures time."""

import importlib
from types import SimpleNamespace

import pytest

from mlx_svd.checkpoint.loader import load
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.speed import measure_speed, measure_speeds


def test_the_first_run_is_discarded_and_medians_are_taken(monkeypatch):
    speeds = iter([(1, 2), (30, 40), (10, 60), (20, 50)])

    def stream(model, tokenizer, prompt, max_tokens):
        assert tokenizer.eos_token_ids == set()
        prefill, decode = next(speeds)
        for count in (1, max_tokens):
            yield SimpleNamespace(
                prompt_tps=prefill,
                generation_tps=decode,
                prompt_tokens=len(prompt),
                generation_tokens=count,
            )

    # mlx_lm.generate as an attribute is a function of that name.
    monkeypatch.setattr(importlib.import_module("mlx_lm.generate"), "stream_generate", stream)
    tokenizer = SimpleNamespace(eos_token_ids={7})
    speed = measure_speed(None, tokenizer, [1, 2, 3], max_tokens=5)
    assert (speed.prefill_tps, speed.decode_tps) == (20, 50)
    assert (speed.prompt_tokens, speed.generated_tokens, speed.runs) == (3, 5, 3)
    assert tokenizer.eos_token_ids == {7}


def test_models_take_turns(monkeypatch):
    order = []

    def stream(model, tokenizer, prompt, max_tokens):
        order.append(model)
        tps = {"a": 10, "b": 20}[model]
        yield SimpleNamespace(
            prompt_tps=tps, generation_tps=2 * tps, prompt_tokens=1, generation_tokens=max_tokens
        )

    monkeypatch.setattr(importlib.import_module("mlx_lm.generate"), "stream_generate", stream)
    tokenizer = SimpleNamespace(eos_token_ids=set())
    a, b = measure_speeds(["a", "b"], tokenizer, [1], max_tokens=5, runs=2)
    assert order == ["a", "b"] * 3
    assert (a.decode_tps, b.decode_tps) == (20, 40)


def test_end_tokens_do_not_end_a_run():
    model, tokenizer = load(DEMO_MODEL, dtype="float32")
    tokenizer.eos_token_ids = set(range(8192))
    speed = measure_speed(model, tokenizer, tokenizer.encode("It was"), max_tokens=6, runs=1)
    assert speed.generated_tokens == 6
    assert speed.prompt_tokens == 2
    assert min(speed.prefill_tps, speed.decode_tps) > 0
    assert tokenizer.eos_token_ids == set(range(8192))


@pytest.mark.parametrize("wrong", [{"prompt": []}, {"max_tokens": 1}, {"runs": 0}])
def test_nothing_to_measure_is_refused(wrong):
    with pytest.raises(MlxSvdError, match="need at least"):
        measure_speed(None, None, **{"prompt": [1], **wrong})
