"""Tiny random teachers with a tokenizer, their compressed students, and a text."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from mlx_svd.finetune import HealSettings
from mlx_svd.plan.policy import RankPolicy
from mlx_svd.plan.recipe import Recipe
from mlx_svd.source.families import PROJECTIONS
from tests.tiny import VOCAB, write_tiny

HALF, QUARTER = RankPolicy(rank_ratio=0.5), RankPolicy(rank_ratio=0.25)
# At a quarter of the ranks of everything even a random model loses something to win back.
FACTORED = Recipe(PROJECTIONS, QUARTER, form="factored")
CHARACTERS = [chr(code) for code in range(32, 32 + VOCAB - 1)]
# 24 windows of 24 characters, three of them held out.
SETTINGS = HealSettings(windows=24, length=24, steps=6, lr=0.005, batch_size=2, save_every=2)


def write_tokenizer(folder: Path, characters: list[str] = CHARACTERS) -> None:
    """One token for each character; id 0 ends a text."""
    vocabulary = {"<eos>": 0} | {c: i for i, c in enumerate(characters, 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_teacher(folder: Path, family: str = "qwen2", **options) -> Path:
    """A tiny random model with a tokenizer, in bfloat16 unless told otherwise."""
    write_tiny(family, folder, **{"dtype": mx.bfloat16, **options})
    write_tokenizer(folder)
    return folder


def write_text(path: Path, tokens: int = 24 * 24 + 5) -> Path:
    """Random characters."""
    path.write_text("".join(np.random.default_rng(5).choice(CHARACTERS, tokens)))
    return path


@dataclass(frozen=True)
class Material:
    """Folders of the dense model and of its compressed student, and a text file."""

    teacher: Path
    student: Path
    text: Path


@pytest.fixture
def material(tmp_path, compressed) -> Callable[..., Material]:
    """(recipe, family, model options) -> Material; all factored at a quarter by default."""

    def make(recipe: Recipe = FACTORED, family: str = "qwen2", **options) -> Material:
        teacher = write_teacher(tmp_path / "teacher", family, **options)
        return Material(teacher, compressed(teacher, recipe)[0], write_text(tmp_path / "text.txt"))

    return make


def tensors(folder: Path) -> dict[str, mx.array]:
    """All tensors of a checkpoint."""
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= mx.load(str(file))
    return found


def equal(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(mx.array_equal(a, b))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
