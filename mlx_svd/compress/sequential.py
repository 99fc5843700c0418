"""Calibrate again for a plan: every input as it is when all that comes before it is compressed.

A projection's error changes the inputs of the next ones. Measured on the original model, the
statistics do not know that; here each group of projections with one input is measured, compressed
and replaced before the next group is (as GPTQ does, arXiv 2210.17323).
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors.numpy import load_file

from mlx_svd.calibrate.accumulator import Accumulator
from mlx_svd.calibrate.blocks import Blocks
from mlx_svd.calibrate.calibrate import peak_memory
from mlx_svd.calibrate.statistics import (
    DRIFT,
    GRADIENT_MOMENTS,
    INPUT_MOMENTS,
    LOSS,
    Calibration,
    CalibrationInfo,
    Statistics,
    begin,
    finished,
    input_group,
    layer_file,
    save_info,
    save_layer,
)
from mlx_svd.calibrate.taps import inputs_of, tapped
from mlx_svd.compress.modules import ModuleRunner
from mlx_svd.compress.store import store_weight
from mlx_svd.errors import MlxSvdError
from mlx_svd.parallel import default_workers, ordered_map
from mlx_svd.plan.plan import Plan, target_dtype
from mlx_svd.source.families import LinearModule, Projection
from mlx_svd.source.source import Source


def calibrate_sequentially(
    source: Source,
    open_model: Callable[[], nn.Module],
    plan: Plan,
    calibration: Calibration,
    folder: Path,
    advance: Callable[[str], None] = lambda path: None,
) -> tuple[Plan, Calibration]:
    """Measure the inputs of every projection of ``plan`` after compressing what is before it.

    open_model: gives a new, lazy model of ``source`` at each call; calibration: the one that the
    plan was made with; its text is run again, its gradient moments are kept. ``advance`` is told
    each module that is done. Returns the same plan resting on the new calibration in ``folder``,
    for ``compress``. A run that was killed is continued. Raises MlxSvdError for a plan with
    slices, whose parts need the inputs of a whole layer at once.
    """
    if sliced := [p.path for p in plan.projections if p.form == "sliced"]:
        raise MlxSvdError(
            f"{sliced[0]}: a slice needs its whole layer's inputs at once; leave out --sequential"
        )
    info = sequential_info(plan, calibration)
    if (found := finished(folder, info)) is None:
        begin(folder, info, calibration.windows)
        began, cpu = time.perf_counter(), time.process_time()
        _Sequence(source, open_model, plan, calibration, folder).run(advance)
        info = replace(
            info,
            seconds=round(time.perf_counter() - began, 2),
            cpu_seconds=round(time.process_time() - cpu, 2),
            peak_memory=peak_memory(),
        )
        save_info(folder, info)
        found = Calibration(folder, info)
    record = {**plan.calibration, "digest": info.digest, "sequential": True}
    return replace(plan, calibration=record), found


def sequential_info(plan: Plan, calibration: Calibration) -> CalibrationInfo:
    """What identifies the sequential calibration of a plan."""
    return replace(calibration.info, sequential=plan.digest)


@dataclass(frozen=True)
class _Growing(Calibration):
    """A calibration whose inputs are measured while it is used; the gradients are the base's.

    inputs: name in the layer's file -> array, of the layer in work.
    """

    base: Calibration | None = None
    inputs: dict[str, np.ndarray] = field(default_factory=dict)

    def statistics(self, projection: Projection) -> Statistics:
        group, known = input_group(projection), self.base.statistics(projection)
        measured = {name: self.inputs[f"{group}.{name}"] for name in (*INPUT_MOMENTS, DRIFT)}
        return replace(known, **measured)


class _Sequence:
    def __init__(
        self,
        source: Source,
        open_model: Callable[[], nn.Module],
        plan: Plan,
        base: Calibration,
        folder: Path,
    ):
        self.source, self.plan, self.base, self.folder = source, plan, base, folder
        self.open_model = open_model
        self.growing = _Growing(folder, base.info, base)
        self.runner = ModuleRunner(source, plan, self.growing)
        self.units = {u.linear_index: u for u in plan.units if u.linear_index is not None}

    def run(self, advance: Callable[[str], None]) -> None:
        tokens = self.base.windows.tokens[:, :-1]
        kind = self.source.config["model_type"]
        blocks = Blocks(self._open_model, kind, tokens)
        originals = Blocks(self.open_model, kind, tokens)
        indexed = list(enumerate(self.source.linears))
        for layer, members in groupby(indexed, lambda item: item[1].projections[0].layer):
            (model, block), original = blocks.open(layer), originals.open(layer)
            modules = dict(model.named_modules())
            self.growing.inputs.clear()
            saved = self.folder / layer_file(layer)
            known = load_file(saved) if saved.is_file() else None
            for group, sharing in groupby(members, lambda i: input_group(i[1].projections[0])):
                numbers = [index for index, _ in sharing]
                first = self.source.linears[numbers[0]]
                if first.projections[0].name not in self.base.info.projections:
                    continue
                if known is None:
                    self._measure(layer, first, (blocks, model, block), (originals, *original))
                else:
                    moments = {f"{group}.{name}" for name in (*INPUT_MOMENTS, DRIFT)}
                    self.growing.inputs.update({n: known[n] for n in moments})
                for linear, weight in self._compressed(numbers):
                    module = modules[linear.path]
                    module.weight = weight.astype(module.weight.dtype)
                    advance(linear.path)
            if known is None:
                save_layer(self.folder, layer, self.growing.inputs | self._gradients(layer))
            blocks.advance(layer, block)
            originals.advance(layer, original[1])

    def _open_model(self) -> nn.Module:
        """A new model whose embedding is as the plan stores it."""
        model = self.open_model()
        modules = dict(model.named_modules())
        for unit in self.plan.units:
            module = modules.get(unit.path)
            if unit.quantization and isinstance(module, nn.Embedding):
                stored = self.source.tensors[f"{unit.path}.weight"][1]
                dtype = target_dtype(stored, self.plan.dtype)
                read = store_weight(module.weight, dtype, unit.quantization)[1]
                module.weight = read.astype(module.weight.dtype)
        return model

    def _measure(self, layer: int, linear: LinearModule, ours: tuple, original: tuple) -> None:
        """Moments of the input that ``linear`` shares with its group; ours, original: (blocks,
        model, block)."""
        accumulator = Accumulator([linear], self.base.info)
        with tapped(ours[1], [linear]) as taps, tapped(original[1], [linear]) as original_taps:
            pairs = zip(
                ours[0].outputs(layer, ours[2]),
                original[0].outputs(layer, original[2]),
                strict=True,
            )
            for _ in pairs:
                # Only what the input depends on is computed; the output stays a graph.
                inputs = inputs_of(taps)
                accumulator.add_inputs(inputs)
                accumulator.add_drift(inputs, inputs_of(original_taps))
        self.growing.inputs.update(accumulator.layers()[layer])

    def _compressed(self, numbers: list[int]) -> Iterator[tuple[LinearModule, mx.array]]:
        """Modules with the weights that their checkpoint will have."""
        stream = self.source.stream()
        jobs = self.runner.read(stream, [self.units[number] for number in numbers])
        for job, matrices in ordered_map(self.runner.decompose, jobs, default_workers()):
            linear = self.source.linears[job.unit.linear_index]
            joined = linear.join(self.runner.store(job, matrices).weights)
            mx.eval(joined)
            yield linear, joined

    def _gradients(self, layer: int) -> dict[str, np.ndarray]:
        """What else the base calibration knows of a layer."""
        arrays = load_file(self.base.folder / layer_file(layer))
        return {
            name: array
            for name, array in arrays.items()
            if name == LOSS or name.rpartition(".")[2] in GRADIENT_MOMENTS
        }
