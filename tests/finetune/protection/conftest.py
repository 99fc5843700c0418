"""A tiny random model that knows some facts, its baseline, and quick settings."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_svd.evaluate.retention import with_paraphrases
from mlx_svd.finetune.protection import ARMS, Arm, Baseline, ProtectSettings, make_baseline
from tests.evaluate.retention.conftest import PROBES
from tests.finetune.conftest import write_teacher, write_text

ASKED = with_paraphrases(PROBES, {"fern": ["A fern, {subject}, is"]})
SETTINGS = ProtectSettings(
    arm=ARMS["none"], steps=4, lr=3e-3, batch_size=2, measure_every=2, tokens=3, prompts=2,
    max_tokens=6, text_windows=8, text_length=16, stored_dtype="float32",
)  # fmt: skip


def of_arm(arm: Arm, **changes) -> ProtectSettings:
    return replace(SETTINGS, arm=arm, **changes)


@pytest.fixture(scope="session")
def make(tmp_path_factory) -> Callable[..., Baseline]:
    """(family, model options) -> baseline of a tiny model with 4 layers; kept for the session."""
    made = {}

    def run(family: str = "qwen2", **options) -> Baseline:
        key = (family, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("protect")
            layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
            options = {"seed": 3, "dtype": mx.float32, layers: 4, **options}
            model = write_teacher(folder / "model", family, **options)
            text = write_text(folder / "text.txt")
            made[key] = make_baseline(model, ASKED, 4, SETTINGS, text=text)
        return made[key]

    return run


@pytest.fixture
def baseline(make) -> Baseline:
    return make()


def folder_of(baseline: Baseline) -> Path:
    return baseline.folder.path
