"""Run a model over text and measure what the scorers need."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_svd.calibrate.accumulator import Accumulator
from mlx_svd.calibrate.blocks import Blocks
from mlx_svd.calibrate.modules import module_losses
from mlx_svd.calibrate.statistics import (
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
from mlx_svd.calibrate.taps import inputs_of, require_finite, tapped
from mlx_svd.calibrate.text import Windows
from mlx_svd.conditions import peak_memory
from mlx_svd.errors import MlxSvdError
from mlx_svd.source.families import LinearModule
from mlx_svd.source.source import Source

# Accumulators in memory at a time; more layers than fit are measured in further passes.
MAX_ACCUMULATOR_BYTES = 4 << 30


def calibrate(
    source: Source,
    open_model: Callable[[], nn.Module],
    windows: Windows,
    folder: Path,
    *,
    projections: tuple[str, ...] = ("q", "k", "o"),
    moments: tuple[str, ...] = ("input", "output"),
    advance: Callable[[str], None] = lambda done: None,
    max_accumulator_bytes: int = MAX_ACCUMULATOR_BYTES,
) -> Calibration:
    """Measure ``moments`` of ``projections`` on every window and save them in ``folder``.

    open_model: gives the loaded model of ``source``, best with lazy weights. Input moments are
    measured block by block, with one block of a newly opened model in memory; output and gradient
    moments need the whole model, for backward passes of the language-model loss on the text itself
    (empirical Fisher). ``advance`` is told each of the ``steps``. A folder that holds the same
    calibration is reused, finished or not. Raises MlxSvdError for a folder with another one, and
    for NaN (names the layer).
    """
    model = open_model()
    info = calibration_info(source, model, windows, projections, moments)
    if (found := finished(folder, info)) is not None:
        return found
    begin(folder, info, windows)
    linears = _linears(source, projections)
    began, cpu = time.perf_counter(), time.process_time()
    losses = {}
    if info.moments == ("input",):
        del model
        _measure_inputs(source, open_model, windows, info, folder, linears, advance)
    else:
        require_finite(model, str(source.folder))
        parts = _passes(linears, info, folder, max_accumulator_bytes)
        _measure_gradients(model, windows, info, folder, parts, advance)
        losses = module_losses(model, source, windows) if "output" in info.moments else {}
    complete = replace(
        info,
        loss=saved_loss(folder, linears[0].projections[0].layer),
        module_losses=losses,
        seconds=round(time.perf_counter() - began, 2),
        cpu_seconds=round(time.process_time() - cpu, 2),
        peak_memory=peak_memory(),
    )
    save_info(folder, complete)
    return Calibration(folder, complete)


def _measure_inputs(
    source: Source,
    open_model: Callable[[], nn.Module],
    windows: Windows,
    info: CalibrationInfo,
    folder: Path,
    linears: list[LinearModule],
    advance: Callable[[str], None],
) -> None:
    """Block by block; a block whose layer an earlier run finished is run, not measured."""
    left = [m for m in linears if not _is_saved(folder, m)]
    last = max((m.projections[0].layer for m in left), default=-1)
    # Every prediction has an input; the last token predicts nothing.
    blocks = Blocks(open_model, source.config["model_type"], windows.tokens[:, :-1])
    for layer in range(last + 1):
        model, block = blocks.open(layer)
        require_finite(block, str(source.folder), f"{blocks.path(layer)}.")
        members = [m for m in left if m.projections[0].layer == layer]
        if not members:
            blocks.advance(layer, block)
            continue
        accumulator = Accumulator(members, info)
        with tapped(model, members) as taps:
            for window, output in enumerate(blocks.outputs(layer, block)):
                mx.eval(output)
                accumulator.add_inputs(inputs_of(taps))
                blocks.hidden[window] = output
                advance(f"{layer}/{window}")
        save_layer(folder, layer, accumulator.layers()[layer])


def _measure_gradients(
    model: nn.Module,
    windows: Windows,
    info: CalibrationInfo,
    folder: Path,
    parts: list[list[LinearModule]],
    advance: Callable[[str], None],
) -> None:
    """Inputs too; the whole text for each part of the layers."""
    for number, part in enumerate(parts):
        accumulator = Accumulator(part, info)
        with tapped(model, part) as taps:
            for index, window in enumerate(windows.tokens):
                accumulator.add_window(model, taps, mx.array(window)[None])
                advance(f"{number}/{index}")
        for layer, arrays in accumulator.layers().items():
            save_layer(folder, layer, arrays)


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


def steps(
    source: Source,
    projections: tuple[str, ...],
    moments: tuple[str, ...],
    windows: int,
    max_accumulator_bytes: int = MAX_ACCUMULATOR_BYTES,
) -> list[str]:
    """What ``calibrate`` tells one by one: "layer/window", or "pass/window" with gradients."""
    linears = _linears(source, projections)
    if set(moments) <= {"input"}:
        rounds = 1 + max(m.projections[0].layer for m in linears)
    else:
        rounds = len(_split(linears, projections, moments, max_accumulator_bytes))
    return [f"{r}/{w}" for r in range(rounds) for w in range(windows)]


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
    left = [m for m in linears if not _is_saved(folder, m)]
    return _split(left, info.projections, info.moments, limit)


def _is_saved(folder: Path, linear: LinearModule) -> bool:
    """Whether the file of the module's layer is complete."""
    return (folder / layer_file(linear.projections[0].layer)).is_file()


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
