"""Tiny models with text for them, and what a calibration should measure, made without taps."""

import hashlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_svd.calibrate.calibrate import calibrate
from mlx_svd.calibrate.statistics import Calibration
from mlx_svd.calibrate.text import Windows
from mlx_svd.checkpoint.loader import load_model
from mlx_svd.source.source import Source, open_source
from tests.tiny import VOCAB, write_tiny

LENGTH = 32
EVERYTHING = ("input", "output", "gradient")


def random_windows(count: int = 3, length: int = LENGTH, seed: int = 0) -> Windows:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (count, length)).astype(np.int32)
    return Windows(tokens, "random", hashlib.sha256(tokens.tobytes()).hexdigest(), count)


def tiny_model(family: str, folder: Path, **options) -> tuple[Source, nn.Module]:
    """A tiny model, opened as a source and loaded."""
    write_tiny(family, folder, **options)
    return open_source(str(folder)), load_model(folder)[0]


def calibrated(
    source: Source, model: nn.Module, folder: Path, windows: Windows | None = None, **options
) -> Calibration:
    """All moments of all attention projections on random windows."""
    options = {"projections": ("q", "k", "v", "o"), "moments": EVERYTHING, **options}
    return calibrate(source, lambda: model, windows or random_windows(), folder, **options)


def rows_of(family: str, name: str, fused: np.ndarray) -> np.ndarray:
    """The rows of one projection in a fused (q, k, v) or (gate, up) matrix of the tiny models."""
    if family == "gpt_neox":  # head by head: 4 heads of [q (16 rows), k, v]
        starts = [48 * head + 16 * "qkv".index(name) for head in range(4)]
        return np.concatenate([fused[start : start + 16] for start in starts])
    sizes = {"gpt2": {"q": 64, "k": 64, "v": 64}, "phi3": {"q": 64, "k": 32, "v": 32}}[family]
    if name in ("gate", "up"):
        sizes = {"gate": 96, "up": 96}
    start = sum(list(sizes.values())[: list(sizes).index(name)])
    return fused[start : start + sizes[name]]


def loss_of(model: nn.Module, tokens: np.ndarray) -> mx.array:
    """Negative log-likelihood of each prediction of a window (L,), (L - 1,)."""
    logits = model(mx.array(tokens[:-1])[None])[0]
    picked = mx.take_along_axis(logits, mx.array(tokens[1:])[:, None], axis=-1)[:, 0]
    return mx.logsumexp(logits, axis=-1) - picked


def inputs_by_hand(model: nn.Module, windows: Windows, monkeypatch) -> dict[str, np.ndarray]:
    """Module path -> every input that its Linear was called with, (tokens, n) float64."""
    paths = {id(m): path for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    seen: dict[str, list[np.ndarray]] = {}
    call = nn.Linear.__call__

    def spy(self, x):
        rows = np.array(x.astype(mx.float32), dtype=np.float64).reshape(-1, x.shape[-1])
        seen.setdefault(paths[id(self)], []).append(rows)
        return call(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "__call__", spy)
        for tokens in windows.tokens:
            mx.eval(model(mx.array(tokens[:-1])[None]))
    return {path: np.concatenate(parts) for path, parts in seen.items()}


def weight_gradients(model: nn.Module, windows: Windows) -> list[dict[str, np.ndarray]]:
    """For each window: parameter name -> gradient of the window's mean loss, by mx.grad."""
    gradient = nn.value_and_grad(model, lambda tokens: loss_of(model, tokens).mean())
    return [
        {n: np.array(g, dtype=np.float64) for n, g in tree_flatten(gradient(tokens)[1])}
        for tokens in windows.tokens
    ]


def output_gradients(
    model: nn.Module, path: str, rows: int, tokens: np.ndarray, monkeypatch
) -> np.ndarray:
    """Gradient of a window's summed loss at the outputs of one module, (L - 1, rows), by adding a
    variable to what its Linear returns."""
    target, call = dict(model.named_modules())[path], nn.Linear.__call__
    added: list[mx.array] = []

    def shifted(self, x):
        y = call(self, x)
        return y + added[0][None] if self is target else y

    def loss(delta):
        added[:] = [delta]
        return loss_of(model, tokens).sum()

    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "__call__", shifted)
        return np.array(mx.grad(loss)(mx.zeros((len(tokens) - 1, rows))), dtype=np.float64)
