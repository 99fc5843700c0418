"""Moments against float64 sums of inputs and gradients that are taken without taps."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_svd.source.families import PROJECTIONS
from tests.calibrate.material import (
    calibrated,
    inputs_by_hand,
    loss_of,
    output_gradients,
    random_windows,
    rows_of,
    tiny_model,
    weight_gradients,
)

FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox", "phi3", "gpt_neo")


def present(source) -> tuple[str, ...]:
    names = {p.name for m in source.linears for p in m.projections}
    return tuple(name for name in PROJECTIONS if name in names)


def close(got, expected, share: float = 1e-5) -> None:
    np.testing.assert_allclose(got, expected, atol=share * np.abs(expected).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_input_moments_are_means_over_the_inputs_of_each_module(family, tmp_path, monkeypatch):
    source, model = tiny_model(family, tmp_path / "model")
    windows = random_windows()
    inputs = inputs_by_hand(model, windows, monkeypatch)
    calibration = calibrated(
        source, model, tmp_path / "c", windows, projections=present(source), moments=("input",)
    )
    assert calibration.info.tokens == 3 * 31
    assert calibration.info.loss is None
    for linear in source.linears:
        x = inputs[linear.path]
        assert len(x) == 3 * 31  # the last token of a window predicts nothing
        for p in linear.projections:
            found = calibration.statistics(p)
            close(found.second, x.T @ x / len(x))
            close(found.mean, x.sum(0) / len(x))
            close(found.mean_abs, np.abs(x).sum(0) / len(x))
            assert found.second.dtype == np.float64
            assert found.output_second is found.gradient is found.row_fisher is None


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_moments_are_those_of_mlx_for_the_weights(family, tmp_path):
    source, model = tiny_model(family, tmp_path / "model")
    windows = random_windows()
    calibration = calibrated(source, model, tmp_path / "c", windows, projections=present(source))
    gradients = weight_gradients(model, windows)
    for linear in source.linears:
        for p in linear.projections:
            g = np.stack([gradient[f"{linear.path}.weight"] for gradient in gradients])
            if linear.fused:
                g = np.stack([rows_of(family, p.name, one) for one in g])
            found = calibration.statistics(p)
            close(found.gradient, g.mean(0), 1e-4)
            close(found.abs_gradient, np.abs(g).mean(0), 1e-4)
            close(found.row_fisher, (g**2).sum(2).mean(0), 1e-4)
    losses = [float(loss_of(model, tokens).mean().item()) for tokens in windows.tokens]
    assert calibration.info.loss == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_moments_are_those_of_explicit_gradients_of_every_token(
    family, tmp_path, monkeypatch
):
    source, model = tiny_model(family, tmp_path / "model")
    windows = random_windows(2)
    names = present(source)
    calibration = calibrated(source, model, tmp_path / "c", windows, projections=names)
    for linear in source.linears:
        rows = dict(model.named_modules())[linear.path].weight.shape[0]
        g = np.concatenate(
            [
                output_gradients(model, linear.path, rows, tokens, monkeypatch)
                for tokens in windows.tokens
            ]
        )
        for p in linear.projections:
            own = rows_of(family, p.name, g.T).T if linear.fused else g
            close(calibration.statistics(p).output_second, own.T @ own / len(g), 1e-4)


def test_output_gradients_are_finite_differences_of_the_loss(tmp_path, monkeypatch):
    """What the test above rests on, checked without any derivative by MLX."""
    _, model = tiny_model("llama", tmp_path / "model")
    tokens, path = random_windows().tokens[0], "model.layers.0.self_attn.v_proj"
    g = output_gradients(model, path, 32, tokens, monkeypatch)
    target, call = dict(model.named_modules())[path], nn.Linear.__call__
    token, row = np.unravel_index(np.abs(g).argmax(), g.shape)
    step, losses = 0.05, []
    for sign in (1, -1):
        shift = np.zeros((1, *g.shape), dtype=np.float32)
        shift[0, token, row] = sign * step

        def moved(self, x, shift=shift):
            return call(self, x) + (mx.array(shift) if self is target else 0)

        monkeypatch.setattr(nn.Linear, "__call__", moved)
        losses.append(float(loss_of(model, tokens).sum().item()))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(g[token, row], rel=0.02)


def test_projections_with_the_same_input_share_it_in_the_file(tmp_path):
    source, model = tiny_model("qwen2", tmp_path / "model")
    calibration = calibrated(source, model, tmp_path / "c", projections=PROJECTIONS)
    arrays = load_file(tmp_path / "c" / "layer-001.safetensors")
    inputs = {f"{g}.{k}" for g in ("qkv", "o", "mlp", "down")
              for k in ("second", "mean", "mean_abs")}  # fmt: skip
    kinds = ("output_second", "gradient", "abs_gradient", "row_fisher")
    assert set(arrays) == inputs | {f"{p}.{k}" for p in PROJECTIONS for k in kinds} | {"loss"}
    by_name = {p.name: p for m in source.linears for p in m.projections if p.layer == 1}
    found = {name: calibration.statistics(p) for name, p in by_name.items()}
    for same in (("q", "k", "v"), ("gate", "up")):
        for name in same:
            np.testing.assert_array_equal(found[name].second, found[same[0]].second)
    assert np.abs(found["q"].second - found["o"].second).max() > 0.1


@pytest.mark.parametrize("wanted", [("k",), ("v", "o")])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_only_what_was_asked_for_is_measured(family, wanted, tmp_path):
    source, model = tiny_model(family, tmp_path / "model")
    whole = calibrated(source, model, tmp_path / "whole")
    part = calibrated(source, model, tmp_path / "part", projections=wanted)
    names = set(load_file(tmp_path / "part" / "layer-000.safetensors"))
    assert {n.split(".")[0] for n in names} == {"qkv", "loss", *wanted} | ({"o"} & set(wanted))
    for linear in source.linears:
        for p in linear.projections:
            if p.name in wanted:
                one, other = whole.statistics(p), part.statistics(p)
                close(other.second, one.second)
                close(other.output_second, one.output_second)
                close(other.abs_gradient, one.abs_gradient)


def test_several_passes_give_the_numbers_of_one(tmp_path):
    source, model = tiny_model("llama", tmp_path / "model", num_hidden_layers=3)
    told: list[str] = []
    calibrated(source, model, tmp_path / "one", advance=told.append)
    assert told == ["0/0", "0/1", "0/2"]
    told.clear()
    calibrated(source, model, tmp_path / "three", advance=told.append, max_accumulator_bytes=1)
    assert told == [f"{number}/{index}" for number in range(3) for index in range(3)]
    for layer in range(3):
        one, three = (
            load_file(tmp_path / name / f"layer-{layer:03d}.safetensors")
            for name in ("one", "three")
        )
        assert one.keys() == three.keys()
        for name in one:
            close(three[name], one[name])


def test_a_model_in_half_precision_is_measured_in_its_own_values(tmp_path, monkeypatch):
    source, model = tiny_model("llama", tmp_path / "model", dtype=mx.bfloat16)
    windows = random_windows()
    x = inputs_by_hand(model, windows, monkeypatch)["model.layers.1.self_attn.o_proj"]
    calibration = calibrated(source, model, tmp_path / "c", windows)
    o = next(p for m in source.linears for p in m.projections if (p.name, p.layer) == ("o", 1))
    close(calibration.statistics(o).second, x.T @ x / len(x))
    assert calibration.info.dtype.endswith("bfloat16")
