"""Tiny models as subjects of an analysis, with random tokens as text."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_svd.analyze.subject import Subject
from mlx_svd.calibrate.text import Windows
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.source.source import open_source
from tests.tiny import VOCAB, write_tiny


@pytest.fixture
def subject(tmp_path: Path) -> Callable[..., Subject]:
    """(family, windows, length, config overrides) -> a tiny random model with random tokens."""

    def make(family: str, windows: int = 3, length: int = 24, **overrides) -> Subject:
        folder = tmp_path / family
        if not folder.exists():
            write_tiny(family, folder, **overrides)
        model, _ = load_model(folder, dtype="float32")
        tokens = np.random.default_rng(0).integers(1, VOCAB, (windows, length), dtype=np.int32)
        text = Windows(tokens, "random tokens", "0", windows)
        return Subject(open_source(str(folder)), model, None, text, "float32")

    return make


def logits(subject: Subject) -> np.ndarray:
    """(N, L, V) float64 of the model as it is now."""
    return np.array(subject.model(mx.array(subject.windows.tokens)), dtype=np.float64)


def low_rank(weight: np.ndarray, rank: int) -> np.ndarray:
    """Best rank-r approximation by numpy's SVD."""
    u, s, v = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]
