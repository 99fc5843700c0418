"""A real model wins back quality on text that it was not healed on."""

from dataclasses import replace

import mlx_svd
from mlx_svd.evaluate.perplexity import perplexity
from mlx_svd.finetune import heal
from tests.finetune.conftest import FACTORED, HALF, SETTINGS


def excerpt(source, target, characters=40_000):
    target.write_text(source.read_text()[:characters])
    return target


def test_healing_on_one_text_lowers_the_perplexity_of_another(shared, compressed, tmp_path):
    teacher = shared / "models" / "qwen2-6m"
    student, _ = compressed(teacher, replace(FACTORED, policy=HALF))
    texts = shared / "data" / "text"
    text = excerpt(texts / "gutenberg.calibration.txt", tmp_path / "calibration.txt")
    other = excerpt(texts / "gutenberg.heldout.txt", tmp_path / "heldout.txt").read_text()
    settings = replace(SETTINGS, windows=16, length=128, steps=5, lr=0.01)
    heal(student, teacher, tmp_path / "out", settings, text=text)
    scores = []
    for folder in (teacher, student, tmp_path / "out"):
        model, tokenizer = mlx_svd.load(folder, dtype="float32")
        scores.append(perplexity(model, tokenizer.encode(other)[:512], window=128).perplexity)
    dense, before, after = scores
    print(f"perplexity: dense {dense:.1f}, compressed {before:.1f}, healed {after:.1f}")
    assert dense < after < 0.7 * before
