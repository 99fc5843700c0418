"""The model before training: what it knows, how well it writes; measured once for all arms."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_svd.calibrate.text import Windows, read_windows
from mlx_svd.checkpoint.loader import load
from mlx_svd.evaluate.facts import Fact
from mlx_svd.evaluate.generation.prompts import read_prompts
from mlx_svd.evaluate.retention import KnowledgeTest, Probe, make_knowledge_test
from mlx_svd.finetune.data import HealingData, split_windows
from mlx_svd.finetune.protection.quality import Quality, QualityMaterial, measure_quality
from mlx_svd.finetune.protection.settings import ProtectSettings
from mlx_svd.finetune.protection.start import is_compressed
from mlx_svd.source.resolve import CHECKPOINT_PATTERNS, ModelFolder, resolve_model
from mlx_svd.source.source import read_config


@dataclass(frozen=True)
class Baseline:
    """model: as it was given; test: of its knowledge; quality: of its texts; windows, data: of the
    text, all and divided into those trained on and those held out; compressed: it is a checkpoint
    of mlx-svd."""

    model: str
    folder: ModelFolder
    compressed: bool
    config: dict
    tokenizer: Any
    test: KnowledgeTest
    quality: Quality
    material: QualityMaterial
    windows: Windows
    data: HealingData

    def open(self, dtype: str) -> nn.Module:
        """The model again, for a loss that keeps near to it."""
        return load(self.folder.path, dtype=dtype)[0]


def make_baseline(
    model: str | Path,
    probes: Sequence[Probe],
    conflict: Sequence[Fact] | int | None,
    settings: ProtectSettings,
    *,
    text: str | Path | None = None,
    prompts: Path | None = None,
    conversations: Path | None = None,
) -> Baseline:
    """Measure ``model`` and divide its facts (see ``make_knowledge_test``; conflict None: nothing
    is trained falsely). Of the settings only seed, facts_limit, scoring, tokens, prompts,
    max_tokens, dtype and the text's are used: one baseline serves arms that differ in the others.

    text: a file or hub data set, None: the one shipped; prompts: file, None: those shipped;
    conversations: file of {messages} rows. Raises MlxSvdError for what these refuse.
    """
    compressed = is_compressed(str(model))
    folder = resolve_model(str(model), None, CHECKPOINT_PATTERNS)
    config = read_config(folder.path)
    loaded, tokenizer = load(folder.path, dtype=settings.dtype)
    windows = read_windows(
        tokenizer,
        text,
        count=settings.text_windows,
        length=settings.text_length,
        vocab_size=config.get("vocab_size"),
    )
    data = split_windows(windows, settings.seed)
    test = make_knowledge_test(
        loaded,
        tokenizer,
        probes,
        conflict,
        seed=settings.seed,
        limit=settings.facts_limit,
        config=config,
        scoring=settings.scoring,
        tokens=settings.tokens,
    )
    shown = read_prompts(prompts, settings.prompts) if settings.prompts else []
    material = QualityMaterial(data.held_out, shown, settings.max_tokens, conversations)
    quality = measure_quality(loaded, tokenizer, config, material)
    return Baseline(
        str(model), folder, compressed, config, tokenizer, test, quality, material, windows, data
    )
