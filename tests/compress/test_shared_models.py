"""The real trained models: compressed at the seeds' ratios they still work."""

import pytest

from mlx_svd.checkpoint.loader import load
from mlx_svd.evaluate.generation.generate import generate
from mlx_svd.evaluate.perplexity import perplexity
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe
from tests.conftest import SHARED_MODELS

# Measured: at most 1.001 and 1.011. A wrong head, bias or row order costs far more.
LARGEST_RATIO = {0.9: 1.005, 0.7: 1.03}


@pytest.mark.parametrize("name", SHARED_MODELS)
def test_compresses_at_90_and_70_percent_and_generates(name, shared, compressed):
    folder = shared / "models" / name
    corpus = "wikipedia" if name == "llama-44m" else "gutenberg"
    text = (shared / "data" / "text" / f"{corpus}.heldout.txt").read_text()[:6000]
    model, tokenizer = load(folder, dtype="float32")
    tokens = [t for line in text.splitlines(keepends=True) for t in tokenizer.encode(line)][:1024]
    dense = perplexity(model, tokens).perplexity
    prompt = "The capital of France is"
    assert "Paris" in generate(model, tokenizer, prompt, max_tokens=8).text
    for ratio, largest in LARGEST_RATIO.items():
        out, _ = compressed(folder, Recipe(policy=RankPolicy(rank_ratio=ratio)))
        model, tokenizer = load(out, dtype="float32")
        measured = perplexity(model, tokens).perplexity / dense
        print(f"{name} at {ratio}: perplexity ratio {measured:.4f}")
        assert 0.98 < measured < largest
        assert "Paris" in generate(model, tokenizer, prompt, max_tokens=8).text
