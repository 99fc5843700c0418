"""Run a model over text and measure what the scorers need."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.calibrate.modules import module_losses
from mlx_svd.calibrate.statistics import (
    LOSS,
    MOMENTS,
    Calibration,
    CalibrationInfo,
    begin,
    finished,
    input_group,
    layer_file,
    model_digest,
    save_info,
    save_layer,
    saved_loss,
)
from mlx_svd.calibrate.taps import gradients_of, inputs_of, tapped
from mlx_svd.calibrate.text import Windows
from mlx_svd.errors import MlxSvdError
from mlx_svd.source.families import LinearModule
from mlx_svd.source.source import Source

# Accumulators in memory at a time; more layers than fit are measured in further passes.
MAX_ACCUMULATOR_BYTES = 4 << 30


def calibrate(
    source: Source,
    model: nn.Module,
    windows: Windows,
    folder: Path,
    *,
    projections: tuple[str, ...] = ("q", "k", "o"),
    moments: tuple[str, ...] = ("input", "output"),
    advance: Callable[[str], None] = lambda done: None,
    max_accumulator_bytes: int = MAX_ACCUMULATOR_BYTES,
) -> Calibration:
    """Measure ``moments`` of ``projections`` on every window and save them in ``folder``.

    model: the loaded model of ``source``. Input moments need forward passes; output and gradient
    moments also backward passes of the language-model loss on the text itself (empirical Fisher).
    ``advance`` is told "pass/window" after each window. A folder that holds the same calibration
    is reused, finished or not. Raises MlxSvdError for a folder with another one, and for NaN
    (names the layer).
    """
    info = calibration_info(source, model, windows, projections, moments)
    if (found := finished(folder, info)) is not None:
        return found
    begin(folder, info)
    linears = _linears(source, projections)
    began, cpu = time.perf_counter(), time.process_time()
    for number, part in enumerate(_passes(linears, info, folder, max_accumulator_bytes)):
        accumulator = _Accumulator(part, info)
        with tapped(model, part) as taps:
            for index, window in enumerate(windows.tokens):
                accumulator.add(model, taps, mx.array(window)[None])
                advance(f"{number}/{index}")
        for layer, arrays in accumulator.layers().items():
            save_layer(folder, layer, arrays)
    complete = replace(
        info,
        loss=saved_loss(folder, linears[0].projections[0].layer),
        module_losses=module_losses(model, source, windows) if "output" in moments else {},
        seconds=round(time.perf_counter() - began, 2),
        cpu_seconds=round(time.process_time() - cpu, 2),
        peak_memory=peak_memory(),
    )
    save_info(folder, complete)
    return Calibration(folder, complete)


def calibration_info(
    source: Source,
    model: nn.Module,
    windows: Windows,
    projections: tuple[str, ...],
    moments: tuple[str, ...],
) -> CalibrationInfo:
    """What a calibration with these settings is identified by."""
    linears = _linears(source, projections)
    return CalibrationInfo(
        base_model=source.name,
        revision=source.revision,
        model=model_digest(source),
        origin=windows.origin,
        text=windows.digest,
        windows=len(windows),
        length=windows.tokens.shape[1],
        tokens=len(windows) * (windows.tokens.shape[1] - 1),
        moments=tuple(name for name in MOMENTS if name in ("input", *moments)),
        projections=tuple(projections),
        dtype=str(dict(model.named_modules())[linears[0].path].weight.dtype),
        layers=1 + max(linear.projections[0].layer for linear in linears),
    )


def too_few_tokens(info: CalibrationInfo, source: Source) -> str | None:
    """A sentence if some input has more dimensions than there were tokens, else None."""
    sizes = {
        p.shape[1] for m in source.linears for p in m.projections if p.name in info.projections
    }
    if info.tokens >= max(sizes):
        return None
    return (
        f"calibrated on {info.tokens} tokens, fewer than the {max(sizes)} inputs of the widest "
        "projection: directions that the text never uses count as almost free; use more windows"
    )


def peak_memory() -> int:
    """Bytes that this process has occupied at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def passes(source: Source, projections: tuple[str, ...], moments: tuple[str, ...]) -> int:
    """How many times the text is run, for a progress bar."""
    return len(_split(_linears(source, projections), projections, moments, MAX_ACCUMULATOR_BYTES))


def _linears(source: Source, projections: tuple[str, ...]) -> list[LinearModule]:
    found = [m for m in source.linears if any(p.name in projections for p in m.projections)]
    if not found:
        raise MlxSvdError(
            f"a {source.config['model_type']} model has no {', '.join(projections)} projection; "
            "change --projections"
        )
    return found


def _passes(linears, info: CalibrationInfo, folder: Path, limit: int) -> list[list[LinearModule]]:
    """Modules in passes of whole layers; layers that an earlier run finished are left out."""
    left = [m for m in linears if not (folder / layer_file(m.projections[0].layer)).is_file()]
    return _split(left, info.projections, info.moments, limit)


def _split(linears, projections, moments, limit: int) -> list[list[LinearModule]]:
    layers: dict[int, list[LinearModule]] = {}
    for linear in linears:
        layers.setdefault(linear.projections[0].layer, []).append(linear)
    parts, filled = [], limit
    for members in layers.values():
        size = _bytes(members, projections, moments)
        if filled + size > limit:
            parts.append([])
            filled = 0
        parts[-1] += members
        filled += size
    return parts


def _bytes(linears: list[LinearModule], projections, moments) -> int:
    """Of the sums of one layer; modules that share an input share its moment."""
    inputs = {input_group(m.projections[0]): m.projections[0].shape[1] for m in linears}
    total = sum(size * size for size in inputs.values())
    for m, n in (
        p.shape for linear in linears for p in linear.projections if p.name in projections
    ):
        total += m * m * ("output" in moments) + 2 * m * n * ("gradient" in moments)
    return 8 * total


class _Accumulator:
    """Sums over windows, float64."""

    def __init__(self, linears: list[LinearModule], info: CalibrationInfo):
        self.linears, self.info = linears, info
        self.sums: dict[tuple[int, str], np.ndarray] = {}
        self.backward = info.moments != ("input",)
        # One module of each input group measures the input for all.
        groups: dict[tuple[int, str], int] = {}
        for index, linear in enumerate(linears):
            p = linear.projections[0]
            groups.setdefault((p.layer, input_group(p)), index)
        self.groups = {index: group for group, index in groups.items()}

    def add(self, model: nn.Module, taps: list, window: mx.array) -> None:
        """One window (1, L)."""
        # Every prediction has an input; the last token predicts nothing.
        if not self.backward:
            inputs, gradients, loss = inputs_of(model, taps, window[:, :-1]), [], None
        else:
            outputs = [sum(p.shape[0] for p in m.projections) for m in self.linears]
            loss, inputs, gradients = gradients_of(model, taps, window, outputs)
            mx.eval(loss, inputs, gradients)
        # All inputs before the gradients, so that the first module that sees a NaN is named.
        for index, (layer, group) in self.groups.items():
            x, path = inputs[index], self.linears[index].path
            self._add(layer, f"{group}.second", x.T @ x, path)
            self._add(layer, f"{group}.mean", x.sum(0), path)
            self._add(layer, f"{group}.mean_abs", mx.abs(x).sum(0), path)
        for linear, x, gradient in zip(self.linears, inputs, gradients, strict=False):
            self._add_gradients(linear, x, gradient)
        # With every layer, so that a run continued after the last one knows it.
        for layer in {linear.projections[0].layer for linear in self.linears} if gradients else ():
            self._add(layer, LOSS, loss[None], "the loss")

    def _add_gradients(self, linear: LinearModule, x: mx.array, g: mx.array) -> None:
        for name, rows in linear.split(g.T).items():
            if name not in self.info.projections:
                continue
            layer = linear.projections[0].layer
            if "output" in self.info.moments:
                self._add(layer, f"{name}.output_second", rows @ rows.T, linear.path)
            if "gradient" in self.info.moments:
                # Of the window's mean loss, so that windows of any length weigh alike.
                gradient = rows @ x / len(x)
                self._add(layer, f"{name}.gradient", gradient, linear.path)
                self._add(layer, f"{name}.abs_gradient", mx.abs(gradient), linear.path)
                squares = mx.square(gradient).sum(1)
                self._add(layer, f"{name}.row_fisher", squares, linear.path)

    def _add(self, layer: int, name: str, value: mx.array, path: str) -> None:
        value = np.array(value, dtype=np.float64)
        if not np.isfinite(value.sum()):
            raise MlxSvdError(
                f"{path}: its activations or gradients hold NaN or Inf on the calibration text; "
                "calibrate in --dtype float32"
            )
        if (layer, name) in self.sums:
            self.sums[layer, name] += value
        else:
            self.sums[layer, name] = value

    def layers(self) -> dict[int, dict[str, np.ndarray]]:
        """layer -> name -> mean over tokens (gradients of weights: over windows)."""
        found: dict[int, dict[str, np.ndarray]] = {}
        for (layer, name), total in self.sums.items():
            per_window = name.endswith(("gradient", "row_fisher"))
            count = self.info.windows if per_window else self.info.tokens
            found.setdefault(layer, {})[name] = total / count
        return found
