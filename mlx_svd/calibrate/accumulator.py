"""Sums of moments over windows of text."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_svd.calibrate.statistics import DRIFT, LOSS, CalibrationInfo, input_group
from mlx_svd.calibrate.taps import gradients_of
from mlx_svd.errors import MlxSvdError
from mlx_svd.source.families import LinearModule


class Accumulator:
    """Float64 sums over windows, of the inputs and the output gradients of some linear modules."""

    def __init__(self, linears: list[LinearModule], info: CalibrationInfo):
        self.linears, self.info = linears, info
        self.sums: dict[tuple[int, str], np.ndarray] = {}
        # One module of each input group measures the input for all.
        groups: dict[tuple[int, str], int] = {}
        for index, linear in enumerate(linears):
            p = linear.projections[0]
            groups.setdefault((p.layer, input_group(p)), index)
        self.groups = {index: group for group, index in groups.items()}

    def add_inputs(self, inputs: list[mx.array]) -> None:
        """One window's inputs (tokens, n) of every module."""
        for index, (layer, group) in self.groups.items():
            x, path = inputs[index], self.linears[index].path
            self._add(layer, f"{group}.second", x.T @ x, path)
            self._add(layer, f"{group}.mean", x.sum(0), path)
            self._add(layer, f"{group}.mean_abs", mx.abs(x).sum(0), path)

    def add_drift(self, inputs: list[mx.array], originals: list[mx.array]) -> None:
        """How far one window's inputs are from the original model's, both (tokens, n)."""
        for index, (layer, group) in self.groups.items():
            x, path = inputs[index], self.linears[index].path
            self._add(layer, f"{group}.{DRIFT}", (originals[index] - x).T @ x, path)

    def add_window(self, model: nn.Module, taps: list, window: mx.array) -> None:
        """Inputs and gradients of one window (1, L), by running the model forth and back."""
        outputs = [sum(p.shape[0] for p in m.projections) for m in self.linears]
        loss, inputs, gradients = gradients_of(model, taps, window, outputs)
        mx.eval(loss, inputs, gradients)
        # All inputs before the gradients, so that the first module that sees a NaN is named.
        self.add_inputs(inputs)
        for linear, x, gradient in zip(self.linears, inputs, gradients, strict=True):
            self._add_gradients(linear, x, gradient)
        # With every layer, so that a run continued after the last one knows it.
        for layer in {linear.projections[0].layer for linear in self.linears}:
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
