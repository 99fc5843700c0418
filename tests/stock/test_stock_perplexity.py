"""mlx_lm perplexity on local data: the number that mlx-svd computes for the same tokens.

The program, like dwq, reads data with the `datasets` package; a local folder works offline.
"""

import json
import math
import re

import numpy as np
import pytest

import mlx_svd
from mlx_svd.evaluate.perplexity import perplexity

pytestmark = [pytest.mark.stock, pytest.mark.usefixtures("datasets_package")]

WINDOW, SAMPLES, SEED = 32, 5, 123


def packed_tokens(tokenizer, folder):
    """The tokens that the program scores: shuffled rows, joined with the end token between."""
    rows = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    np.random.seed(SEED)
    tokens = []
    for index in np.random.permutation(len(rows)):
        tokens += [*tokenizer.encode(rows[index]), tokenizer.eos_token_id]
    return tokens[: WINDOW * SAMPLES]


@pytest.mark.parametrize("name", ["factored", "pivot", "8bit_auto", "corrected", "untouched"])
def test_perplexity_equals_that_of_mlx_svd(name, checkpoint, run_stock, data_folder):
    trusted = [] if name == "untouched" else ["--trust-remote-code"]
    flags = ["--data-path", data_folder, "--sequence-length", WINDOW, "--num-samples", SAMPLES]
    done = run_stock("perplexity", "--model", checkpoint(name), *trusted, *flags, "--seed", SEED)
    printed = re.search(r"Perplexity: ([\d.]+)", done.stdout)
    assert printed, done.stdout
    model, tokenizer = mlx_svd.load(checkpoint(name))
    expected = perplexity(model, packed_tokens(tokenizer, data_folder), WINDOW)
    assert expected.tokens == SAMPLES * (WINDOW - 1)
    # mlx-lm's loss is MLX's, whose float32 sums over the vocabulary are off by some 1e-5 nats a
    # token on x86; ours are float64 there.
    assert math.isclose(float(printed[1]), expected.perplexity, abs_tol=6e-4, rel_tol=4e-5)
