"""Greedy generation in batches, against one token at a time without a cache."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.checkpoint.loader import load, load_model
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.likelihood.greedy import greedy_tokens
from mlx_svd.evaluate.likelihood.prefix_cache import mask_axes
from mlx_svd.evaluate.likelihood.split import SplitModel
from tests.tiny import FAMILIES, VOCAB, write_tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_different_lengths_continue_as_each_alone(family, tmp_path):
    model, _ = load_model(write_tiny(family, tmp_path / "model"), dtype="float32")
    rng = np.random.default_rng(1)
    # Longer and shorter than the sliding window of 16.
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (3, 25, 12)]
    split = SplitModel(model)
    found = greedy_tokens(split, mask_axes(split), prompts, 8)
    for prompt, tokens in zip(prompts, found, strict=True):
        whole = list(prompt)
        for _ in range(8):
            whole.append(int(mx.argmax(model(mx.array(whole)[None])[0, -1]).item()))
        assert tokens == whole[len(prompt) :]


def test_a_row_ends_before_a_stop_token_and_the_others_go_on():
    model, tokenizer = load(DEMO_MODEL, dtype="float32")
    split = SplitModel(model)
    prompts = [tokenizer.encode(f"The capital of {c} is") for c in ("France", "Italy")]
    free = greedy_tokens(split, mask_axes(split), prompts, 6)
    stop = next(t for t in free[0] if t not in free[1])
    stopped = greedy_tokens(split, mask_axes(split), prompts, 6, frozenset({stop}))
    assert stopped[0] == free[0][: free[0].index(stop)]
    assert stopped[1] == free[1]


def test_a_logit_that_is_not_finite_stops_with_the_name_of_the_prompt():
    model, _ = load(DEMO_MODEL, dtype="float32")
    split = SplitModel(model)
    model.model.norm.weight = model.model.norm.weight * float("nan")
    with pytest.raises(MlxSvdError, match=r"question b: a logit.*not finite.*float32"):
        greedy_tokens(split, 4, [[1, 2], [3]], 3, names=["question b", "question c"])
