"""mlx_lm generate, cache_prompt and benchmark on the command line."""

import re

import pytest

pytestmark = pytest.mark.stock

WITH_CODE = ["factored", "pivot", "8bit_auto", "per_head", "sliced"]
WITH_CODE += ["corrected", "corrected_8bit_factors"]
# Not tested, because stock mlx-lm cannot do it with this checkpoint whatever its layers are:
# generate has one --trust-remote-code, which it does not pass on to the draft model.
STOCK_LIMITS = {"generate --draft-model": "a draft model with model_file is refused"}


@pytest.mark.parametrize("name", WITH_CODE)
def test_generate_gives_the_text_of_mlx_svd(name, checkpoint, stock_text, greedy):
    assert stock_text(checkpoint(name)) == greedy(checkpoint(name))


def test_generate_needs_no_flag_for_the_dense_form(checkpoint, stock_text, greedy):
    assert stock_text(checkpoint("dense"), trust=False) == greedy(checkpoint("dense"))


def test_generate_without_trust_refuses_a_low_rank_checkpoint(checkpoint, run_stock):
    done = run_stock("generate", "--model", checkpoint("factored"), "--prompt", "a", check=False)
    assert done.returncode != 0
    assert "ValueError" in done.stderr
    assert "trust_remote_code" in done.stderr


@pytest.mark.parametrize("name", ["factored", "pivot"])
def test_generate_with_8_bit_keys_and_values_gives_the_same_text(
    name, checkpoint, stock_text, greedy
):
    flags = ["--kv-bits", 8, "--quantized-kv-start", 0]
    assert stock_text(checkpoint(name), *flags) == greedy(checkpoint(name))


def test_generate_with_a_low_rank_target_and_a_dense_draft_model(checkpoint, stock_text, greedy):
    text = stock_text(checkpoint("factored"), "--draft-model", checkpoint("untouched"))
    assert text == greedy(checkpoint("factored"))


def test_generate_with_a_low_rank_draft_model_is_refused_by_mlx_lm(checkpoint, run_stock, prompt):
    models = ["--model", checkpoint("untouched"), "--draft-model", checkpoint("factored")]
    done = run_stock("generate", *models, "--trust-remote-code", "--prompt", prompt, check=False)
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr


def test_a_cached_prompt_continues_like_an_uncached_one(
    checkpoint, run_stock, tmp_path, prompt, max_tokens, greedy
):
    path, cache = checkpoint("pivot"), tmp_path / "cache.safetensors"
    head, tail = prompt.split(",")
    trusted, cached = ["--trust-remote-code"], ["--prompt-cache-file", cache]
    run_stock("cache_prompt", "--model", path, *trusted, *cached, "--prompt", head + ",")
    flags = ["--ignore-chat-template", "--max-tokens", max_tokens, "--verbose", "False"]
    done = run_stock("generate", "--model", path, *trusted, *cached, *flags, "--prompt", tail)
    assert done.stdout.removesuffix("\n") == greedy(path)


@pytest.mark.parametrize("name", ["pivot", "8bit_factored"])
def test_benchmark_prints_speeds(name, checkpoint, run_stock):
    flags = ["--trust-remote-code", "-p", 16, "-g", 4, "-n", 1]
    done = run_stock("benchmark", "--model", checkpoint(name), *flags)
    found = re.search(r"Averages: prompt_tps=([\d.]+), generation_tps=([\d.]+)", done.stdout)
    assert found, done.stdout
    assert float(found[1]) > 0
    assert float(found[2]) > 0
